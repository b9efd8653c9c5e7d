// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem scan`: where a target's memory holds given bytes.

mod many;
mod matches;
mod pattern;
mod pattern_list;
mod places;
mod report;
#[cfg(feature = "yara")]
mod rules;
mod search;
mod source;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
#[cfg(feature = "yara")]
use clap::builder::styling::Style;
use indicatif::ProgressBar;

#[cfg(feature = "yara")]
use crate::escape::escape;
use crate::failure::usage;
#[cfg(feature = "yara")]
use crate::hexdump;
use crate::input::{Input, InputMemory, data_of_view, data_within, reached};
use crate::number::{integer, parse};
use crate::output::Output;
use crate::process::Process;
use crate::progress;
use crate::range::{GpaRange, in_order, left_out, parse_range, select, total};
use crate::unreadable::Unreadable;
use matches::{Around, MAX_AROUND};
use pattern::{Form, Pattern};
pub(crate) use places::{Piece, Places};
use report::Report;
#[cfg(feature = "yara")]
use rules::{RuleMatch, Rules};
use search::Search;
use source::{CopySource, DumpSource, MappedSource};

/// Exit code of a scan that found nothing, as grep's.
const NOTHING: u8 = 1;

/// Exit code of a scan that failed, as grep's.
pub(crate) const FAILED: u8 = 2;

/// What makes a pattern unnecessary.
const REQUIRED: &[&str] = if cfg!(feature = "yara") {
    &["text", "utf16", "regex", "list", "yara"]
} else {
    &["text", "utf16", "regex", "list"]
};

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Bytes as pairs of hexadecimal digits, ? for any digit, for example 4889e5??c3 or 4?8b
    #[arg(value_name = "PATTERN", required_unless_present_any = REQUIRED)]
    patterns: Vec<String>,
    /// Text in UTF-8; may be given again
    #[arg(long, value_name = "TEXT")]
    text: Vec<String>,
    /// Text in UTF-16, little-endian; may be given again
    #[arg(long, value_name = "TEXT")]
    utf16: Vec<String>,
    /// Regular expression over bytes, in the syntax of Rust's regex crate without Unicode, for
    /// example '[a-z]+@example\.com'; \x00 is a byte. A match has at most 4096 bytes; the next
    /// one begins behind it, but in gapless rows of more than 4096 bytes; may be given again
    #[arg(long, value_name = "REGEX")]
    regex: Vec<String>,
    /// File of patterns: NAME hex|text|utf16|regex PATTERN a line, # before a comment; may be
    /// given again
    #[arg(id = "list", long = "patterns", value_name = "FILE")]
    lists: Vec<PathBuf>,
    /// Take text and regular expressions in any case
    #[arg(long, short)]
    ignore_case: bool,
    /// File of YARA rules; may be given again. All the memory is one object, and guest-physical
    /// addresses are its offsets
    #[cfg(feature = "yara")]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["patterns", "text", "utf16", "regex", "list", "ignore_case", "before", "after"])]
    yara: Vec<PathBuf>,
    /// Look only at these guest-physical addresses (with --pid or --vcpu, virtual ones), for
    /// example 1M..2M; END is not part of it; may be given again
    #[arg(long = "range", value_name = "START..END", value_parser = parse_range)]
    ranges: Vec<GpaRange>,
    /// Show this many bytes before each match, at most 4096
    #[arg(long, value_name = "BYTES", value_parser = parse_around, default_value = "0", hide_default_value = true)]
    before: u64,
    /// Show this many bytes after each match, at most 4096
    #[arg(long, value_name = "BYTES", value_parser = parse_around, default_value = "0", hide_default_value = true)]
    after: u64,
    /// End after this many matches; with --yara, keep this many of each string [default with
    /// --yara: 1000]
    #[arg(long, value_name = "COUNT", value_parser = integer(1..=u64::MAX))]
    max: Option<u64>,
    /// How many threads search [default: one for each CPU]. Memory that is mapped is searched by
    /// one for each CPU at most
    #[arg(long, value_name = "COUNT", value_parser = integer(1..=1024u16))]
    threads: Option<u16>,
    #[command(flatten)]
    process: Process,
    #[command(flatten)]
    input: Input,
}

const AFTER_HELP: &str = "\
Matches come in the order of addresses, each with the bytes at its place. Memory that the target never used, or has
given back, counts as zeros and is not read, and what cannot be read counts as zeros too; a match must hold some other byte. Adjacent ranges are searched as one.
With --yara the matches of a rule come together, and a rule whose condition needs no string is named alone.

Exit codes:
  0  something was found
  1  nothing was found
  2  failed, standard error says why; or the command line is wrong
  3  some memory could not be read, standard error says which; what the rest holds was printed
  4  with --pid or --vcpu: the guest was restarted while it was read";

fn parse_around(text: &str) -> Result<u64, String> {
    match parse(text)? {
        bytes if bytes <= MAX_AROUND => Ok(bytes),
        _ => Err(format!("at most {MAX_AROUND} bytes are shown around a match")),
    }
}

/// What is looked for.
enum Query {
    Patterns(Vec<Pattern>),
    #[cfg(feature = "yara")]
    Rules(Box<Rules>),
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let ranges = in_order(&self.ranges)?;
        // Before the token is used.
        let wanted = self.wanted()?;
        let cpus = std::thread::available_parallelism().context("cannot count the CPUs")?.get();
        let threads = self.threads.map_or(cpus, usize::from);
        // Threads that wait for nothing have no use for more.
        let busy = threads.min(cpus);
        let (opened, space) = self.process.open(&self.input, "scan", &ranges)?;
        let unreadable = &Unreadable::default();
        let found = self.process.with_memory(&self.input, &opened, space, |memory| {
            let all = reached(memory)?;
            let parts = select(&ranges, &all)?;
            if !self.process.is_given() {
                left_out(&ranges, &all);
            }
            let view = opened.view().filter(|_| !self.process.is_given());
            let mapped =
                view.map(|view| MappedSource::new(view, &parts, unreadable)).transpose()?.flatten();
            let data = match view {
                Some(view) => data_of_view(view, &parts, busy)?,
                None => data_within(memory, &parts)?,
            };
            let runs = join(&parts);
            let places = Places { runs: &runs, data: &data };
            let bar = progress::bytes(total(&data), output);
            let found = match (mapped, &opened) {
                (Some(mapped), _) => self.search(&wanted, places, busy, &mapped, &bar, output)?,
                (None, InputMemory::File(file)) if !self.process.is_given() => {
                    let dump = DumpSource { file, unreadable };
                    self.search(&wanted, places, threads, &dump, &bar, output)?
                }
                (None, _) => {
                    let copied = CopySource { memory, unreadable };
                    self.search(&wanted, places, threads, &copied, &bar, output)?
                }
            };
            bar.finish_and_clear();
            Ok(found)
        })?;
        Ok(unreadable.report(if found { ExitCode::SUCCESS } else { ExitCode::from(NOTHING) }))
    }

    fn wanted(&self) -> Result<Query> {
        #[cfg(feature = "yara")]
        if !self.yara.is_empty() {
            return Ok(Query::Rules(Box::new(Rules::compile(&self.yara, self.max)?)));
        }
        let forms = [
            (Form::Hex, &self.patterns),
            (Form::Text, &self.text),
            (Form::Utf16, &self.utf16),
            (Form::Regex, &self.regex),
        ];
        let mut patterns = Vec::new();
        for (form, texts) in forms {
            patterns.extend(Pattern::all(form, texts, self.ignore_case)?);
        }
        for list in &self.lists {
            patterns.extend(pattern_list::read(list, self.ignore_case)?);
        }
        if self.ignore_case && !self.patterns.is_empty() && patterns.len() == self.patterns.len() {
            return Err(usage(
                "bytes have no case: --ignore-case is for text and regular expressions",
            ));
        }
        Ok(Query::Patterns(patterns))
    }

    /// Prints what is found; whether it is something.
    fn search(
        &self,
        wanted: &Query,
        places: Places<'_>,
        threads: usize,
        source: &impl source::Source,
        bar: &ProgressBar,
        output: &mut Output,
    ) -> Result<bool> {
        let patterns = match wanted {
            Query::Patterns(patterns) => patterns,
            #[cfg(feature = "yara")]
            Query::Rules(rules) => {
                let matched = rules.run(
                    places,
                    threads,
                    source,
                    |bytes| bar.inc(bytes),
                    |at| self.process.address(at),
                )?;
                matched.iter().try_for_each(|rule| bar.suspend(|| print_rule(rule, output)))?;
                return Ok(!matched.is_empty());
            }
        };
        let around = Around { before: self.before, after: self.after };
        let max = self.max.map_or(usize::MAX, |max| usize::try_from(max).unwrap_or(usize::MAX));
        let report = Report { patterns, around, address: &|at| self.process.address(at) };
        let mut search = Search::new(patterns, places)?;
        (search.around, search.max, search.threads) = (around, max, threads);
        let count = search.run(source, |matches, bytes| {
            if !matches.is_empty() {
                bar.suspend(|| matches.iter().try_for_each(|found| report.print(found, output)))?;
            }
            bar.inc(bytes);
            Ok(())
        })?;
        Ok(count > 0)
    }
}

#[cfg(feature = "yara")]
fn print_rule(rule: &RuleMatch, output: &mut Output) -> Result<()> {
    if output.is_json() {
        return Ok(output.object(rule)?);
    }
    let name = escape(&rule.rule);
    if rule.matches.is_empty() {
        output.line(&name)?;
    }
    for found in &rule.matches {
        let shown = found.bytes.get(..16).unwrap_or(&found.bytes);
        let line = hexdump::line(found.address.get(), shown, |_| None::<Style>);
        output.line(format!("{line}  {name} {}", escape(&found.string)))?;
    }
    Ok(())
}

/// The ranges, adjacent ones as one.
pub(crate) fn join(ranges: &[GpaRange]) -> Vec<GpaRange> {
    let mut joined: Vec<GpaRange> = Vec::new();
    for range in ranges {
        match joined.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => joined.push(range.clone()),
        }
    }
    joined
}
