// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem info`: which kernel a Linux guest runs.

mod all;

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use kvmmem_linux::identity::Identity;
use serde::Serialize;

use crate::failure::escape;
use crate::linux::Guest;
use crate::number::Hex;
use crate::output::{Output, columns};

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// On the host: a row for each virtual machine that runs here, with its kernel, host name, uptime and number of processes, or
    /// with the reason why it cannot be read
    #[arg(long, conflicts_with_all = ["target", "token", "token_file", "listen", "device", "broker", "file", "note"])]
    all: bool,
    #[command(flatten)]
    guest: Guest,
}

const AFTER_HELP: &str = "\
The boot time is in seconds since 1970. The uptime is that of the kernel's last look at its clock, which one that has nothing
to do may put off for some seconds.

Exit codes:
  0  done; what could not be found out is a - or null, with --all also a machine that cannot be read
  1  failed, standard error says why: no kernel was found
  2  the command line is wrong";

/// The kernel, as JSON.
#[derive(Serialize)]
struct KernelLine<'a> {
    release: &'a str,
    version: &'a str,
    host_name: &'a str,
    build_id: Option<&'a str>,
    command_line: Option<&'a str>,
    booted: Option<u64>,
    uptime_ms: Option<u64>,
    kaslr_offset: Hex,
    cr3: Hex,
    levels: u8,
    /// Where its VMCOREINFO note is.
    note: Hex,
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        if self.all {
            return all::run(output);
        }
        self.guest.with_kernel("info", |kernel| {
            let identity = Identity::of(kernel)?;
            let root = kernel.space().root();
            let line = KernelLine {
                release: &identity.release,
                version: &identity.version,
                host_name: &identity.host_name,
                build_id: identity.build_id.as_deref(),
                command_line: identity.command_line.as_deref(),
                booted: identity.booted.map(|time| time.as_secs()),
                uptime_ms: identity.uptime.map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
                kaslr_offset: Hex(identity.kaslr_offset),
                cr3: Hex(root.cr3),
                levels: root.levels.count(),
                note: Hex(kernel.note().gpa),
            };
            if output.is_json() {
                output.object(&line)?;
            } else {
                for line in columns(&line.rows()) {
                    output.line(line)?;
                }
            }
            Ok(ExitCode::SUCCESS)
        })
    }
}

impl KernelLine<'_> {
    fn rows(&self) -> Vec<[String; 2]> {
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let seconds = |ms: u64| format!("{}.{:02} s", ms / 1000, ms % 1000 / 10);
        [
            ("release", escape(self.release)),
            ("version", escape(self.version)),
            ("host name", escape(self.host_name)),
            ("build id", or_none(self.build_id.map(escape))),
            ("command line", or_none(self.command_line.map(escape))),
            ("booted", or_none(self.booted.map(|time| time.to_string()))),
            ("uptime", or_none(self.uptime_ms.map(seconds))),
            ("KASLR offset", format!("{:#x}", self.kaslr_offset.0)),
            ("CR3", format!("{:#x}", self.cr3.0)),
            ("levels", self.levels.to_string()),
            ("note", format!("{:#x}", self.note.0)),
        ]
        .into_iter()
        .map(|(name, value)| [name.to_owned(), value])
        .collect()
    }
}
