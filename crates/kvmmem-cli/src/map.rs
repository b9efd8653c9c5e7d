// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem map`: a page of a target in this process, through `/dev/kvmmem`.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::Args;
use kvmmem::{Device, MappedPage, PAGE_SIZE};
use serde::Serialize;

use crate::connect::Connect;
use crate::failure::usage;
use crate::hexdump::Hexdump;
use crate::interrupt::Interrupt;
use crate::number::{Hex, hex, parse};
use crate::output::Output;
use crate::time::parse_milliseconds;

#[derive(Args)]
pub(crate) struct Arguments {
    /// Guest-physical address in the target; the page that holds it is mapped
    #[arg(value_parser = parse)]
    gpa: u64,
    /// Print each change of the 64-bit word at GPA, until interrupted
    #[arg(long)]
    watch: bool,
    /// How long --watch waits between two reads, at most 1s; a number without a unit is in
    /// milliseconds
    #[arg(long, value_name = "TIME", default_value = "10ms", requires = "watch", value_parser = parse_interval)]
    interval: Duration,
    /// The device to map through [default: KVMMEM_DEVICE, or else /dev/kvmmem]
    #[arg(long, value_name = "PATH")]
    device: Option<PathBuf>,
    #[command(flatten)]
    connect: Connect,
}

/// What happens to the page, as JSON.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum Event {
    Mapped { gpa: Hex, gva: Hex, hex: String },
    Changed { gpa: Hex, from: Hex, to: Hex },
    Unmapped { zero: bool },
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    match parse_milliseconds(text)? {
        time if time > Duration::from_secs(1) => Err("it is at most 1s".into()),
        time => Ok(time),
    }
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let offset = usize::try_from(self.gpa % PAGE_SIZE as u64)?;
        let page_gpa = self.gpa - offset as u64;
        if self.watch && !offset.is_multiple_of(8) {
            return Err(usage(format!(
                "GPA {:#x} is not a multiple of 8: --watch cannot read a word there",
                self.gpa
            )));
        }
        // Before waiting for the host: a missing device is an error at once.
        let device =
            Device::open(self.device.clone().unwrap_or_else(kvmmem::device::default_path))?;
        let mut session = self.connect.accept()?;
        let page = device.map(session.map_token()?, page_gpa)?;

        let mut bytes = vec![0; PAGE_SIZE];
        page.read(0, &mut bytes)?;
        if output.is_json() {
            output.object(&Event::Mapped {
                gpa: Hex(page_gpa),
                gva: Hex(page.gva() as u64),
                hex: hex(&bytes),
            })?;
        } else {
            for line in Hexdump::default().lines(page_gpa, &bytes) {
                output.line(line)?;
            }
        }
        if self.watch {
            self.watch(&page, offset, output)?;
        }

        page.unmap()?.read(0, &mut bytes)?;
        let zero = bytes.iter().all(|byte| *byte == 0);
        if output.is_json() {
            output.object(&Event::Unmapped { zero })?;
        }
        ensure!(zero, "the page is not zero after the unmap: the host broke the ABI");
        Ok(ExitCode::SUCCESS)
    }

    fn watch(&self, page: &MappedPage, offset: usize, output: &mut Output) -> Result<()> {
        let interrupt = Interrupt::catch()?;
        let mut from = page.read_u64(offset)?;
        loop {
            let to = page.read_u64(offset)?;
            if to != from {
                if output.is_json() {
                    output.object(&Event::Changed {
                        gpa: Hex(self.gpa),
                        from: Hex(from),
                        to: Hex(to),
                    })?;
                } else {
                    output.line(format!("{:012x}  {from:#018x} -> {to:#018x}", self.gpa))?;
                }
                from = to;
            }
            if interrupt.wait(self.interval)? {
                return Ok(());
            }
        }
    }
}
