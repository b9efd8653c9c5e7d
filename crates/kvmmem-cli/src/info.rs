// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem info`: which kernel a Linux guest runs.

mod all;

use std::fmt::Write;
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Error, Result};
use clap::Args;
use kvmmem_linux::identity::{Identity, Missing};
use serde::Serialize;

use crate::failure;
use crate::linux::{Guest, INCOMPLETE};
use crate::number::Hex;
use crate::output::{Output, columns};

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// On the host: a row for each virtual machine that runs here, with its kernel, host name,
    /// uptime and number of processes, or with the reason why it cannot be read
    #[arg(long, conflicts_with_all = ["target", "token", "token_file", "listen", "device", "broker", "file", "note", "kernel"])]
    all: bool,
    #[command(flatten)]
    guest: Guest,
}

const AFTER_HELP: &str = "\
The boot time is in UTC; with --json it is in seconds since 1970. The uptime is that of the kernel's last look at its clock, which one that has nothing
to do may put off for some seconds.

Exit codes:
  0  done; with --all a machine that cannot be read is a row with -, and the reason
  1  failed, standard error says why: no kernel was found
  2  the command line is wrong
  3  something was not found: it is a - or null, and standard error says why
  4  the guest was restarted while it was read";

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
    /// Where its VMCOREINFO note is, if it has one that is whole.
    note: Option<Hex>,
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
                uptime_ms: identity
                    .uptime
                    .map(|time| u64::try_from(time.as_millis()).unwrap_or(u64::MAX)),
                kaslr_offset: Hex(identity.kaslr_offset),
                cr3: Hex(root.cr3),
                levels: root.levels.count(),
                note: kernel.note().gpa.map(Hex),
            };
            if output.is_json() {
                output.object(&line)?;
            } else {
                for line in columns(&line.rows()) {
                    output.line(line)?;
                }
            }
            match missing(&identity.missing) {
                Some(error) => Err(error),
                None => Ok(ExitCode::SUCCESS),
            }
        })
    }
}

/// What was not found, and why.
fn missing(missing: &[Missing]) -> Option<Error> {
    let line = |Missing { what, why }: &Missing| format!("{what} ({why})");
    let all: Vec<_> = missing.iter().map(line).collect();
    (!all.is_empty()).then(|| failure::exit(INCOMPLETE, format!("not found: {}", all.join("; "))))
}

impl KernelLine<'_> {
    fn rows(&self) -> Vec<[String; 2]> {
        let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
        let seconds = |ms: u64| format!("{}.{:02} s", ms / 1000, ms % 1000 / 10);
        [
            ("release", self.release.to_owned()),
            ("version", self.version.to_owned()),
            ("host name", self.host_name.to_owned()),
            ("build id", or_none(self.build_id.map(str::to_owned))),
            ("command line", or_none(self.command_line.map(str::to_owned))),
            ("booted", or_none(self.booted.map(utc))),
            ("uptime", or_none(self.uptime_ms.map(seconds))),
            ("KASLR offset", format!("{:#x}", self.kaslr_offset.0)),
            ("CR3", format!("{:#x}", self.cr3.0)),
            ("levels", self.levels.to_string()),
            ("note", or_none(self.note.as_ref().map(|note| format!("{:#x}", note.0)))),
        ]
        .into_iter()
        .map(|(name, value)| [name.to_owned(), value])
        .collect()
    }
}

/// Seconds since 1970 as RFC 3339 has them.
fn utc(seconds: u64) -> String {
    let time = UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    let mut text = String::new();
    // What has no four digits for its year has no such form.
    match time.map(|time| write!(text, "{}", humantime::format_rfc3339_seconds(time))) {
        Some(Ok(())) => text,
        _ => format!("{seconds} s after 1970"),
    }
}

#[cfg(test)]
mod tests {
    use super::utc;

    #[test]
    fn times_are_in_utc() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (1_795_699_872, "2026-11-26T13:31:12Z"),
            (253_402_300_799, "9999-12-31T23:59:59Z"),
            (253_402_300_800, "253402300800 s after 1970"),
            (u64::MAX, "18446744073709551615 s after 1970"),
        ] {
            assert_eq!(utc(seconds), text);
        }
    }
}
