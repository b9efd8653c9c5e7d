// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem watch`: how a target's memory changes.

mod picture;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use kvmmem::view::{Access, Event, View};

use crate::failure::usage;
use crate::interrupt::Interrupt;
use crate::number::{parse, parse_duration, parse_length};
use crate::output::Output;
use crate::range::pages;
use crate::source::Source;
use picture::Picture;

/// More than this is nothing to look at.
const MAX_LEN: u64 = 1 << 20;

/// The longest wait between two looks for signals.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// First guest-physical address in the target
    #[arg(value_parser = parse)]
    gpa: u64,
    /// How many bytes, at most 1M
    #[arg(value_parser = parse_watched)]
    len: u64,
    /// How long to wait between two looks, for example 200ms or 1s
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = parse_duration)]
    interval: Duration,
    /// Look this many times, then end [default: until interrupted]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    #[command(flatten)]
    source: Source,
}

const AFTER_HELP: &str = "\
On a terminal with room for it the picture stays in place, and what changed since the last look is red. Else each
changed line is printed, with the seconds since the beginning before it.

Exit codes:
  0  interrupted, or COUNT looks taken
  1  failed, or the view has ended; standard error says why
  2  the command line is wrong";

/// A length that can be watched.
fn parse_watched(text: &str) -> Result<u64, String> {
    match parse_length(text)? {
        len if len > MAX_LEN => Err(format!("{len:#x} bytes are too many; watch at most {MAX_LEN:#x}")),
        len => Ok(len),
    }
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let Self { gpa, len, .. } = *self;
        if gpa.checked_add(len - 1).is_none() {
            return Err(usage(format!(
                "{len:#x} bytes from GPA {gpa:#x} on pass the end of the address space"
            )));
        }
        let view = self.source.attach(Access::ReadOnly, "watch", &[pages(gpa, len)])?;
        let interrupt = Interrupt::catch()?;
        let mut bytes = vec![0; usize::try_from(len)?];
        view.read_at(gpa, &mut bytes)?;
        let picture = Picture::begin(gpa, &bytes, output)?;
        let mut looks = 1;
        while self.count.is_none_or(|count| looks < count)
            && self.sleep(&view, &interrupt, &picture, output)?
        {
            let mut now = vec![0; bytes.len()];
            view.read_at(gpa, &mut now)?;
            picture.go_on(&bytes, &now, output)?;
            bytes = now;
            looks += 1;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Waits for the next look; `false` if none is wanted.
    fn sleep(
        &self,
        view: &View,
        interrupt: &Interrupt,
        picture: &Picture,
        output: &mut Output,
    ) -> Result<bool> {
        let start = Instant::now();
        loop {
            if interrupt.has_come() {
                return Ok(false);
            }
            let left = self.interval.saturating_sub(start.elapsed());
            if left.is_zero() {
                return Ok(true);
            }
            match view.wait(left.min(SIGNAL_INTERVAL))? {
                None => {}
                Some(Event::Changed) => picture.tell_reset(output)?,
                Some(Event::Revoked) => bail!("the view has ended: the grant was taken back"),
                Some(Event::Gone) => bail!("the view has ended: the target, or the host's service, is gone"),
            }
        }
    }
}
