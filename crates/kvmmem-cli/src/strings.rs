// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem strings`: the text in a target's memory.

mod collect;
mod extract;
mod text;

use std::fmt::Write;
use std::ops::ControlFlow;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem_memory::Memory;
use serde::Serialize;

use crate::escape::{escape, json};
use crate::input::{Input, data_within, reached};
use crate::number::{Address, integer};
use crate::output::Output;
use crate::parallel::{Sink, in_order};
use crate::process::Process;
use crate::progress;
use crate::range::{GpaRange, in_order as ranges_in_order, left_out, parse_range, select, total};
use crate::scan::{Piece, Places, join};
use crate::unreadable::Unreadable;
use collect::Collector;
use extract::{Fragment, MAX_LEN, extract};
use text::{Encoding, Text};

/// Bytes that are copied at a time, and that a thread takes at a time.
const PIECE: u64 = 256 * 1024;
const BATCH: u64 = 4 << 20;

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Leave out strings of fewer characters
    #[arg(long, short = 'n', value_name = "COUNT", default_value_t = 4, value_parser = integer(1..=MAX_LEN))]
    min: u16,
    /// Look for this alone
    #[arg(long, short, value_enum)]
    encoding: Option<Encoding>,
    /// Look only at these guest-physical addresses (with --pid or --vcpu, virtual ones), for
    /// example 1M..2M; END is not part of it; may be given again
    #[arg(long = "range", value_name = "START..END", value_parser = parse_range)]
    ranges: Vec<GpaRange>,
    /// How many threads search [default: one for each CPU]
    #[arg(long, value_name = "COUNT", value_parser = integer(1..=1024u16))]
    threads: Option<u16>,
    #[command(flatten)]
    process: Process,
    #[command(flatten)]
    input: Input,
}

const AFTER_HELP: &str = "\
A line for each string: its guest-physical address (with --pid or --vcpu, its virtual one), its encoding, and the printable ASCII characters and tabs that follow
each other there, as one byte each or in UTF-16, little-endian, at any address. A string of more than 4096 characters is
printed in parts. Strings come in the order of addresses. Memory that the target never used is not read.

Exit codes:
  0  all memory was searched
  1  failed, standard error says why
  2  the command line is wrong
  3  some memory could not be read, standard error says which; the strings in the rest were printed
  4  with --pid or --vcpu: the guest was restarted while it was read";

/// A string, as JSON.
#[derive(Serialize)]
struct TextLine<'a> {
    #[serde(flatten)]
    address: Address,
    encoding: Encoding,
    text: &'a str,
}

/// The text of a piece.
struct PieceText {
    piece: GpaRange,
    fragments: Vec<Fragment>,
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let wanted = ranges_in_order(&self.ranges)?;
        let (opened, space) = self.process.open(&self.input, "strings", &wanted)?;
        self.process
            .with_memory(&self.input, &opened, space, |memory| self.search(memory, &wanted, output))
    }

    fn search(
        &self,
        memory: &dyn Memory,
        wanted: &[GpaRange],
        output: &mut Output,
    ) -> Result<ExitCode> {
        let all = reached(memory)?;
        let parts = select(wanted, &all)?;
        if !self.process.is_given() {
            left_out(wanted, &all);
        }
        let data = data_within(memory, &parts)?;
        let threads = match self.threads {
            Some(threads) => threads.into(),
            None => std::thread::available_parallelism().context("cannot count the CPUs")?.get(),
        };
        let runs = join(&parts);
        let places = Places { runs: &runs, data: &data };
        let bar = progress::bytes(total(&data), output);
        let unreadable = Unreadable::default();
        let min = usize::from(self.min);
        let work = |batch: Vec<Piece>, sink: &Sink<PieceText>| {
            let mut buffer = Vec::new();
            batch.into_iter().try_for_each(|Piece { starts, run, .. }| {
                // With the second byte of a character that begins in the last one.
                let end = run.end.min(starts.end + 1);
                buffer.resize(usize::try_from(end - starts.start)?, 0);
                let read = |gpa: u64, buffer: &mut [u8]| {
                    unreadable.read(memory, gpa, buffer).context("the search ended early")
                };
                places.fill(starts.start, &mut buffer, read)?;
                let len = usize::try_from(starts.end - starts.start)?;
                let mut fragments = extract(starts.start, &buffer, len, min);
                fragments.retain(|fragment| {
                    self.encoding.is_none_or(|wanted| wanted == fragment.encoding())
                });
                sink.send(PieceText { piece: starts, fragments })
            })
        };
        let mut collector = Collector::new(min);
        in_order(threads, places.batches(0, PIECE, BATCH), work, |found| {
            let bytes = found.piece.end - found.piece.start;
            let texts = collector.add(found.piece, found.fragments);
            bar.suspend(|| self.print(&texts, output))?;
            bar.inc(bytes);
            Ok(ControlFlow::Continue(()))
        })?;
        bar.finish_and_clear();
        self.print(&collector.end(), output)?;
        Ok(unreadable.report(ExitCode::SUCCESS))
    }

    /// Prints strings, all at once: there may be millions.
    fn print(&self, texts: &[Text], output: &mut Output) -> Result<()> {
        // An address and an encoding take 22 bytes.
        let len = texts.iter().map(|text| text.text.len() + 24).sum();
        let mut lines = String::with_capacity(len);
        for Text { at, encoding, text } in texts {
            if output.is_json() {
                let address = self.process.address(*at);
                lines += &json(&TextLine { address, encoding: *encoding, text })?;
                lines.push('\n');
            } else {
                let encoding = if *encoding == Encoding::Ascii { "ascii" } else { "utf16" };
                writeln!(lines, "{at:012x}  {encoding}  {}", escape(text))?;
            }
        }
        // The text is escaped, and there are no styles for the stream to take out.
        Ok(output.raw(lines.as_bytes())?)
    }
}
