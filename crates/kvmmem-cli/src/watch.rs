// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem watch`: how a target's memory changes.

mod picture;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use clap::Args;
use kvmmem::view::Event;
use kvmmem_linux::Space;
use kvmmem_linux::tasks::Task;
use kvmmem_memory::Memory;

use crate::address_space::{LinuxSpace, Virtual};
use crate::failure::usage;
use crate::input::{Input, InputMemory};
use crate::interrupt::Interrupt;
use crate::linux::RestartCheck;
use crate::number::{integer, parse, parse_length};
use crate::output::Output;
use crate::range::pages;
use crate::time::parse_duration;
use picture::Picture;

/// More than this is nothing to look at.
const MAX_LEN: u64 = 1 << 20;

/// The longest wait between two looks for signals.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// First guest-physical address in the target, or guest-virtual with --pid, --vcpu or --cr3
    /// kernel
    #[arg(value_parser = parse)]
    address: u64,
    /// How many bytes, at most 1M
    #[arg(value_parser = parse_watched)]
    len: u64,
    /// How long to wait between two looks, for example 200ms or 1s
    #[arg(long, value_name = "TIME", default_value = "200ms", value_parser = parse_duration)]
    interval: Duration,
    /// Look this many times, then end [default: until interrupted]
    #[arg(long, value_name = "COUNT", value_parser = integer(1..=u64::MAX))]
    count: Option<u64>,
    #[command(flatten)]
    space: Virtual,
    #[command(flatten)]
    input: Input,
}

const AFTER_HELP: &str = "\
On a terminal with room for it the picture stays in place, and what changed since the last look is red. Else each
changed line is printed, with the seconds since the beginning before it. With --pid and --vcpu the addresses are looked up
again each time, and a page that is not in memory ends the command. With --vcpu that is in the page tables that the vCPU uses when
the command begins. A dump file does not change.

Exit codes:
  0  interrupted, or COUNT looks taken
  1  failed, or the view has ended; standard error says why
  2  the command line is wrong
  4  with --pid, --vcpu or --cr3 kernel: the guest was restarted";

/// A length that can be watched.
fn parse_watched(text: &str) -> Result<u64, String> {
    match parse_length(text)? {
        len if len > MAX_LEN => {
            Err(format!("{len:#x} bytes are too many; watch at most {MAX_LEN:#x}"))
        }
        len => Ok(len),
    }
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let Self { address, len, space, .. } = *self;
        if address.checked_add(len - 1).is_none() {
            let kind = if space.is_given() { "GVA" } else { "GPA" };
            return Err(usage(format!(
                "{len:#x} bytes from {kind} {address:#x} on pass the end of the address space"
            )));
        }
        let linux = space.linux()?;
        if let Some(cr3) = space.cr3() {
            return Err(usage(format!(
                "watch looks by --pid PID, --vcpu N or --cr3 kernel, not by --cr3 {cr3:#x}"
            )));
        }
        if let Some(vcpu) = space.vcpu {
            let (opened, space) = self.input.open_at_vcpu("watch", vcpu)?;
            let restart = RestartCheck::begin(&opened)?;
            let space = Space::new(opened.memory(), space, 0);
            return self.watch(&opened, output, |bytes| {
                // The guest changes its page tables.
                space.forget();
                restart.settle(None, space.read(address, bytes).map_err(Into::into))
            });
        }
        let wanted = if linux.is_some() { Vec::new() } else { vec![pages(address, len)] };
        let opened = self.input.open("watch", &wanted)?;
        let Some(linux) = linux else {
            return self.watch(&opened, output, |bytes| match &opened {
                InputMemory::View(view, _) => Ok(view.read_at(address, bytes)?),
                InputMemory::File(file) => Ok(file.read_at(address, bytes)?),
            });
        };
        linux.with_kernel(&self.input, &opened, |kernel, restart| {
            let same = |task: &Task| (task.gva, task.start);
            let first = LinuxSpace::new(kernel, &linux, &self.input)?.task.as_ref().map(same);
            let look = |bytes: &mut [u8]| {
                // The guest changes its page tables, and gives its numbers of processes to others.
                let now = LinuxSpace::new(kernel, &linux, &self.input)?;
                if now.task.as_ref().map(same) != first {
                    bail!("the process has ended, and its number belongs to another one");
                }
                now.read(address, bytes).1.map_or(Ok(()), Err)
            };
            self.watch(&opened, output, |bytes| restart.settle(Some(kernel), look(bytes)))
        })
    }

    fn watch(
        &self,
        opened: &InputMemory,
        output: &mut Output,
        read: impl Fn(&mut [u8]) -> Result<()>,
    ) -> Result<ExitCode> {
        let interrupt = Interrupt::catch()?;
        let mut bytes = vec![0; usize::try_from(self.len)?];
        read(&mut bytes)?;
        let picture = Picture::begin(self.space.address(self.address), &bytes, output)?;
        let mut looks = 1;
        while self.count.is_none_or(|count| looks < count)
            && self.sleep(opened, &interrupt, &picture, output)?
        {
            let mut now = vec![0; bytes.len()];
            read(&mut now)?;
            picture.go_on(&bytes, &now, output)?;
            bytes = now;
            looks += 1;
        }
        Ok(ExitCode::SUCCESS)
    }

    /// Waits for the next look; `false` if none is wanted.
    fn sleep(
        &self,
        opened: &InputMemory,
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
            let InputMemory::View(view, _) = opened else {
                interrupt.wait(left)?;
                continue;
            };
            match view.wait(left.min(SIGNAL_INTERVAL))? {
                None => {}
                Some(Event::Changed) => picture.tell_reset(output)?,
                Some(Event::Revoked) => bail!("the view has ended: the grant was revoked"),
                Some(Event::Gone) => {
                    bail!("the view has ended: the target, or the host's service, is gone")
                }
            }
        }
    }
}
