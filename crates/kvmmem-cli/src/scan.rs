// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem scan`: where a target's memory holds given bytes.

mod pattern;
mod places;
#[cfg(feature = "yara")]
mod rules;
mod search;

#[cfg(feature = "yara")]
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow};
use clap::Args;
use clap::builder::styling::Style;
use kvmmem::view::{Access, Mapping, Range, State, View, ViewError};
use serde::Serialize;

use crate::failure::escape;
use crate::hexdump;
use crate::number::{Hex, hex};
use crate::output::Output;
use crate::progress;
use crate::range::{GpaRange, in_order, parse_range, select, total};
use crate::source::{Source, data_within, ranges};
use pattern::Pattern;
use places::Places;
#[cfg(feature = "yara")]
use rules::{Matched, Rules};
use search::{Match, Search};

/// Exit code of a scan that found nothing, as grep's.
const NOTHING: u8 = 1;

/// Exit code of a scan that failed, as grep's.
pub(crate) const FAILED: u8 = 2;

/// What makes a pattern unnecessary.
const REQUIRED: &[&str] =
    if cfg!(feature = "yara") { &["text", "utf16", "yara"] } else { &["text", "utf16"] };

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Bytes as pairs of hexadecimal digits, ?? for any byte, for example 4889e5??c3
    #[arg(value_name = "PATTERN", value_parser = Pattern::from_hex, required_unless_present_any = REQUIRED)]
    patterns: Vec<Pattern>,
    /// Text in UTF-8; may be given again
    #[arg(long, value_name = "TEXT", value_parser = Pattern::from_text)]
    text: Vec<Pattern>,
    /// Text in UTF-16, little-endian; may be given again
    #[arg(long, value_name = "TEXT", value_parser = Pattern::from_utf16)]
    utf16: Vec<Pattern>,
    /// File of YARA rules; may be given again. All the memory is one object, and guest-physical addresses are its offsets
    #[cfg(feature = "yara")]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["patterns", "text", "utf16", "threads"])]
    yara: Vec<PathBuf>,
    /// Look only at these guest-physical addresses, for example 1M..2M; END is behind the range; may be given again
    #[arg(long = "range", value_name = "START..END", value_parser = parse_range)]
    ranges: Vec<GpaRange>,
    /// End after this many matches; with --yara, keep this many of each string [default with --yara: 1000]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    max: Option<u64>,
    /// How many threads search [default: one for each CPU]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    #[command(flatten)]
    source: Source,
}

const AFTER_HELP: &str = "\
Matches come in the order of addresses, each with the bytes at its place. Memory that the target never used, or has
given back, counts as zeros and is not read; a match must hold some that it uses. Adjacent ranges are searched as one.
With --yara the matches of a rule come together, and a rule whose condition needs no string is named alone.

Exit codes:
  0  something was found
  1  nothing was found
  2  failed, standard error says why; or the command line is wrong";

/// A match, as JSON.
#[derive(Serialize)]
struct Found<'a> {
    gpa: Hex,
    pattern: &'a str,
    /// The bytes at its place.
    hex: String,
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let wanted = in_order(&self.ranges)?;
        // Before the token is used.
        #[cfg(feature = "yara")]
        let rules = if self.yara.is_empty() { None } else { Some(Rules::compile(&self.yara, self.max)?) };
        let view = self.source.attach(Access::ReadOnly, "scan", &wanted)?;
        let parts = select(&wanted, &ranges(&view)?)?;
        let map = |part: &GpaRange| view.map(Range { gpa: part.start, len: part.end - part.start });
        let mappings: Option<Vec<Mapping>> = match parts.iter().map(map).collect::<Result<_, _>>() {
            Ok(mappings) => Some(mappings),
            // Private RAM cannot be mapped, only copied.
            Err(ViewError::Private { .. }) => None,
            Err(error) => return Err(error.into()),
        };
        let data: Vec<GpaRange> =
            parts.iter().flat_map(|part| data_within(&view, part)).collect::<Result<_>>()?;

        let bar = progress::bytes(total(&data), output);
        let read = |gpa: u64, buffer: &mut [u8]| match &mappings {
            Some(mappings) => read(&view, mappings, gpa, buffer),
            None => view.read_at(gpa, buffer).context("the scan ended early"),
        };
        let runs = join(&parts);
        let places = Places { runs: &runs, data: &data };
        #[cfg(feature = "yara")]
        if let Some(rules) = rules {
            let matched = rules.run(places, read, |bytes| bar.inc(bytes))?;
            bar.finish_and_clear();
            matched.iter().try_for_each(|rule| tell_rule(rule, output))?;
            return Ok(exit_code(!matched.is_empty()));
        }
        let patterns = [&self.patterns[..], &self.text, &self.utf16].concat();
        let threads = match self.threads {
            Some(threads) => threads.into(),
            None => std::thread::available_parallelism().context("cannot count the CPUs")?.get(),
        };
        let max = self.max.map_or(usize::MAX, |max| usize::try_from(max).unwrap_or(usize::MAX));
        let search = Search { patterns: &patterns, places, max, threads };
        let count = search.run(read, |matches, bytes| {
            if !matches.is_empty() {
                bar.suspend(|| matches.iter().try_for_each(|found| tell(found, &patterns, output)))?;
            }
            bar.inc(bytes);
            Ok(())
        })?;
        bar.finish_and_clear();
        Ok(exit_code(count > 0))
    }
}

fn exit_code(found: bool) -> ExitCode {
    if found { ExitCode::SUCCESS } else { ExitCode::from(NOTHING) }
}

/// Reads memory that lies in one of the mappings, which ascend.
fn read(view: &View, mappings: &[Mapping], gpa: u64, buffer: &mut [u8]) -> Result<()> {
    let after = mappings.partition_point(|mapping| mapping.gpa() <= gpa);
    let mapping = after.checked_sub(1).and_then(|at| mappings.get(at)).context("memory is not mapped")?;
    mapping.read(gpa - mapping.gpa(), buffer).map_err(|error| {
        let error = anyhow::Error::new(error);
        match view.status().map(|status| status.state) {
            Ok(State::Revoked) => {
                error.context("the scan ended early: the grant was taken back; get a new token")
            }
            Ok(State::Gone) => {
                error.context("the scan ended early: the target, or the host's service, is gone")
            }
            Ok(State::Open) => {
                error.context("the scan ended early: the target's memory was resized; scan again")
            }
            Err(_) => error,
        }
    })
}

fn tell(found: &Match, patterns: &[Pattern], output: &mut Output) -> Result<()> {
    let pattern = patterns.get(found.pattern).ok_or_else(|| anyhow!("there is no such pattern"))?;
    if output.is_json() {
        output.object(&Found { gpa: Hex(found.gpa), pattern: pattern.name(), hex: hex(&found.context) })?;
        return Ok(());
    }
    let bold = Style::new().bold();
    let line = hexdump::line(found.gpa, &found.context, |at| (at < pattern.len()).then_some(bold));
    match patterns {
        [_] => output.line(line)?,
        _ => output.line(format!("{line}  {}", escape(pattern.name())))?,
    }
    Ok(())
}

#[cfg(feature = "yara")]
fn tell_rule(rule: &Matched, output: &mut Output) -> Result<()> {
    if output.is_json() {
        return Ok(output.object(rule)?);
    }
    let name = escape(&rule.rule);
    if rule.matches.is_empty() {
        output.line(&name)?;
    }
    for found in &rule.matches {
        let shown = found.bytes.get(..16).unwrap_or(&found.bytes);
        let line = hexdump::line(found.gpa.0, shown, |_| None);
        output.line(format!("{line}  {name} {}", escape(&found.string)))?;
    }
    Ok(())
}

/// The ranges, adjacent ones as one.
fn join(ranges: &[GpaRange]) -> Vec<GpaRange> {
    let mut joined: Vec<GpaRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range.clone()),
        }
    }
    joined
}
