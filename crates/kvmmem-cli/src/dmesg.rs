// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem dmesg`: the log of a Linux guest's kernel.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem_linux::log::{self, Caller, Record};
use serde::Serialize;

use crate::failure;
use crate::linux::{Guest, INCOMPLETE};
use crate::number::count;
use crate::output::Output;

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    #[command(flatten)]
    guest: Guest,
}

const AFTER_HELP: &str = "\
Kernels of 5.10 and later, also those built without symbols and types. Times are in seconds since boot.

Exit codes:
  0  done
  1  failed, standard error says why; what was printed before is not all
  2  the command line is wrong
  3  records are missing, standard error says how many: memory of the log is damaged
  4  the guest was restarted while it was read; what was printed is not to be trusted";

/// A record, as JSON.
#[derive(Serialize)]
struct RecordLine<'a> {
    seq: u64,
    time_us: u64,
    level: u8,
    facility: u8,
    #[serde(skip_serializing_if = "Option::is_none")]
    thread: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cpu: Option<u32>,
    subsystem: &'a str,
    device: &'a str,
    text: &'a str,
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        self.guest.with_kernel("dmesg", |kernel| {
            let mut records = log::records(kernel)?;
            for record in &mut records {
                let record = record.context("the log ends early")?;
                if output.is_json() {
                    output.object(&RecordLine::new(&record))?;
                } else {
                    lines(&record).try_for_each(|line| output.line(line))?;
                }
            }
            if records.overwritten() > 0 {
                tracing::warn!(
                    "the guest overwrote {} of its log while it was read",
                    count(records.overwritten(), "record")
                );
            }
            if records.damaged() > 0 {
                let why = match self.guest.is_live() {
                    true => "the guest's memory is damaged",
                    false => "the dump is damaged, or the guest wrote to its log while it was made",
                };
                let lost = count(records.damaged(), "record");
                return Err(failure::exit(
                    INCOMPLETE,
                    format!("{lost} of the log not printed: {why}"),
                ));
            }
            Ok(ExitCode::SUCCESS)
        })
    }
}

/// A record as dmesg(1) prints it: each of its lines with the time.
fn lines(record: &Record) -> impl Iterator<Item = String> {
    let time = format!("[{:5}.{:06}] ", record.time.as_secs(), record.time.subsec_micros());
    record.text.split('\n').map(move |line| time.clone() + line)
}

impl<'a> RecordLine<'a> {
    fn new(record: &'a Record) -> Self {
        let (thread, cpu) = match record.caller {
            Caller::Thread(thread) => (Some(thread), None),
            Caller::Cpu(cpu) => (None, Some(cpu)),
        };
        Self {
            seq: record.seq,
            time_us: u64::try_from(record.time.as_micros()).unwrap_or(u64::MAX),
            level: record.level,
            facility: record.facility,
            thread,
            cpu,
            subsystem: &record.subsystem,
            device: &record.device,
            text: &record.text,
        }
    }
}
