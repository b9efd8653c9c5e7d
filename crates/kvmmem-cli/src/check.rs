// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem check`: signs that a Linux guest's kernel was tampered with.

mod outcome;

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use kvmmem_linux::integrity::{self, Finding, Place};
use serde::Serialize;

use crate::escape::escape;
use crate::linux::{Damage, Guest};
use crate::number::{Hex, parse};
use crate::output::{Output, columns};
use outcome::{check, combine, is_sound, lstars};

/// Exit code where something was found.
const FOUND: u8 = 3;

/// How often a guest that runs is compared where something is found, and how long to wait in
/// between: it adds and removes modules and tasks.
const ROUNDS: usize = 3;
const PAUSE: Duration = Duration::from_millis(50);

/// The check of a register, which a kernel does not have.
const LSTAR: &str = "lstar";

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// MSR_LSTAR of a vCPU, where you have its registers: compared with the kernel's entry of
    /// system calls [default: that of each vCPU, where the VMM shows it: with --target, a VM
    /// of kvmmem vm]
    #[arg(long, value_name = "ADDRESS", value_parser = parse)]
    lstar: Option<u64>,
    #[command(flatten)]
    guest: Guest,
}

const AFTER_HELP: &str = "\
Compared are where the table of system calls, the function that calls their handlers and the gates of interrupts lead, the list
of modules with /sys/module, and the lists of processes and threads with the table of pids. What a guest that runs does not
have each time is left out. Nothing found does not mean that nothing is there: all that is compared is the guest's own word.

Exit codes:
  0  nothing was found
  1  failed, standard error says why: no kernel was found, or one without symbols or types, or its structures are damaged
  2  the command line is wrong
  3  something was found, or could not be checked, as memory of the guest is damaged: standard error says what
  4  the guest was restarted while it was read";

/// What a check has looked at, as JSON.
#[derive(Serialize)]
struct CheckLine<'a> {
    check: &'static str,
    /// `None` where the kernel has no such thing, or it was not checked.
    examined: Option<usize>,
    found: usize,
    /// Why it was not checked.
    #[serde(skip_serializing_if = "Option::is_none")]
    not_checked: Option<&'a str>,
}

/// What was found, as JSON.
#[derive(Serialize)]
#[serde(tag = "finding", rename_all = "snake_case")]
enum FindingLine<'a> {
    Hook {
        check: &'static str,
        entry: &'a str,
        /// `None` for a register.
        at: Option<Hex>,
        target: Hex,
        place: String,
    },
    Hidden {
        check: &'static str,
        name: &'a str,
        structure: Hex,
        found_in: &'a str,
        missing_from: &'a str,
    },
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let outcomes = self.guest.with_kernel_and_registers("check", |kernel, registers| {
            let mut rounds = vec![check(kernel)?];
            let mut outcomes = combine(&rounds);
            while self.guest.is_live() && rounds.len() < ROUNDS && !outcomes.iter().all(is_sound) {
                thread::sleep(PAUSE);
                rounds.push(check(kernel)?);
                outcomes = combine(&rounds);
            }
            let values = match self.lstar {
                Some(lstar) => Ok(vec![("MSR_LSTAR".to_owned(), lstar)]),
                None => lstars(registers),
            };
            let report = match values {
                Ok(values) => Ok(Some(integrity::check_lstar(kernel, &values)?)),
                Err(reason) => Err(reason),
            };
            outcomes.push((LSTAR, report));
            Ok(outcomes)
        })?;
        let findings = || {
            let reports = outcomes
                .iter()
                .filter_map(|(check, report)| Some((*check, report.as_ref().ok()?.as_ref()?)));
            reports.flat_map(|(check, report)| {
                report.findings.iter().map(move |finding| (check, finding))
            })
        };
        let lines = outcomes.iter().map(|(check, report)| {
            let not_checked = report.as_ref().err().map(String::as_str);
            let report = report.as_ref().ok().and_then(Option::as_ref);
            CheckLine {
                check,
                examined: report.map(|report| report.examined),
                found: report.map_or(0, |report| report.findings.len()),
                not_checked,
            }
        });
        if output.is_json() {
            for line in lines {
                output.object(&line)?;
            }
            for (check, finding) in findings() {
                output.object(&FindingLine::new(check, finding))?;
            }
        } else {
            let header = ["CHECK", "EXAMINED", "FOUND"].map(str::to_owned);
            for line in columns(&std::iter::once(header).chain(lines.map(row)).collect::<Vec<_>>())
            {
                output.line(line)?;
            }
            for (_, finding) in findings() {
                output.line(sentence(finding))?;
            }
            for (check, reason) in
                outcomes.iter().filter_map(|(check, report)| Some((check, report.as_ref().err()?)))
            {
                output.line(format!("{check} was not checked: {}", escape(reason)))?;
            }
        }
        let mut damage = Damage::default();
        for (check, _) in
            outcomes.iter().filter(|(check, report)| *check != LSTAR && report.is_err())
        {
            damage.add(format!("what {check} compares"));
        }
        self.guest.end(damage)?;
        Ok(if findings().next().is_some() { FOUND.into() } else { ExitCode::SUCCESS })
    }
}

fn row(line: CheckLine<'_>) -> [String; 3] {
    let examined = line.examined.map_or_else(|| "-".to_owned(), |count| count.to_string());
    let found = if line.not_checked.is_some() { "-".to_owned() } else { line.found.to_string() };
    [line.check.to_owned(), examined, found]
}

fn sentence(finding: &Finding) -> String {
    match finding {
        Finding::Hook { entry, gva, target, place } => {
            let at = gva.map_or_else(String::new, |gva| format!(", at {gva:#x},"));
            format!("{entry}{at} leads to {target:#x}: {}", escape(&self::place(place)))
        }
        Finding::Hidden { name, gva, found, missing } => {
            format!("{}, at {gva:#x}, is in {found} and not in {missing}", escape(name))
        }
    }
}

fn place(place: &Place) -> String {
    match place {
        Place::Text { symbol, offset: 0 } => symbol.clone(),
        Place::Text { symbol, offset } => format!("{symbol}+{offset:#x}"),
        Place::Module(name) => format!("module {name}"),
        Place::Elsewhere => "outside of the kernel's text and of its modules".to_owned(),
    }
}

impl<'a> FindingLine<'a> {
    fn new(check: &'static str, finding: &'a Finding) -> Self {
        match finding {
            Finding::Hook { entry, gva, target, place } => Self::Hook {
                check,
                entry,
                at: gva.map(Hex),
                target: Hex(*target),
                place: self::place(place),
            },
            Finding::Hidden { name, gva, found, missing } => Self::Hidden {
                check,
                name,
                structure: Hex(*gva),
                found_in: found,
                missing_from: missing,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::outcome::tests::hidden;
    use super::*;

    #[test]
    fn a_finding_is_a_sentence_that_cannot_drive_the_terminal() {
        let text = sentence(&hidden("process 7 (\x1b[2J)"));
        assert_eq!(
            text,
            "process 7 (\\u{1b}[2J), at 0x1000, is in the table of pids and not in the lists of tasks"
        );
        let finding = Finding::Hook {
            entry: "system call 62".to_owned(),
            gva: Some(0x1000),
            target: 0x2008,
            place: Place::Text { symbol: "kill".to_owned(), offset: 8 },
        };
        assert_eq!(sentence(&finding), "system call 62, at 0x1000, leads to 0x2008: kill+0x8");
        let finding = Finding::Hook {
            entry: "MSR_LSTAR".to_owned(),
            gva: None,
            target: 0x2008,
            place: Place::Elsewhere,
        };
        let text = "MSR_LSTAR leads to 0x2008: outside of the kernel's text and of its modules";
        assert_eq!(sentence(&finding), text);
    }
}
