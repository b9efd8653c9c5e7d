// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What came of the checks of a kernel.

use anyhow::{Context, Error, Result};
use kvmmem_linux::Kernel;
use kvmmem_linux::integrity::{Check, Report};

use crate::input::{NOT_SHOWN, Registers};
use crate::linux::collect;
use crate::vcpu;

/// CR4.FRED.
const FRED: u64 = 1 << 32;

/// A check's name, and what came of it: nothing where the kernel has no such thing, a reason where
/// it was not checked.
pub(super) type Outcome = (&'static str, Result<Option<Report>, String>);

/// MSR_LSTAR of each vCPU that runs 64-bit code, and what to call it; or why it is not known.
pub(super) fn lstars(registers: &Registers) -> Result<Vec<(String, u64)>, String> {
    const REMEDY: &str = "give MSR_LSTAR with --lstar ADDRESS";
    let vcpus = registers.as_ref().map_err(|reason| format!("{reason}; {REMEDY}"))?;
    let mut values = Vec::new();
    for (number, vcpu) in vcpus.iter().enumerate() {
        // One that was not started has none yet, and one with FRED enters the kernel elsewhere.
        if vcpu::control(vcpu).space().is_err() || vcpu.cr4 & FRED != 0 {
            continue;
        }
        let lstar = vcpu.lstar.ok_or_else(|| format!("{NOT_SHOWN}; {REMEDY}"))?;
        values.push((format!("MSR_LSTAR of vCPU {number}"), lstar));
    }
    match values.len() {
        0 => Err(format!("no vCPU enters a 64-bit kernel by MSR_LSTAR; {REMEDY}")),
        _ => Ok(values),
    }
}

/// All checks that the kernel has something for.
pub(super) fn check(kernel: &Kernel<'_>) -> Result<Vec<Outcome>> {
    let run = |check: Check| {
        if !check.applies(kernel) {
            return Ok((check.name(), Ok(None)));
        }
        match collect(|| Ok(std::iter::once(check.run(kernel)))) {
            Ok(mut reports) => Ok((check.name(), Ok(reports.rows.pop()))),
            Err(error) if error.is_local() => {
                Ok((check.name(), Err(format!("{:#}", Error::from(error)))))
            }
            Err(error) => Err(error).with_context(|| format!("cannot check {}", check.name())),
        }
    };
    Check::ALL.into_iter().map(run).collect()
}

pub(super) fn is_sound((_, report): &Outcome) -> bool {
    report
        .as_ref()
        .is_ok_and(|report| report.as_ref().is_none_or(|report| report.findings.is_empty()))
}

/// What came of the checks of one guest in all `rounds`: what was found each time. Findings of a
/// single round are not confirmed where the other rounds failed; such a check was not checked.
pub(super) fn combine(rounds: &[Vec<Outcome>]) -> Vec<Outcome> {
    let of_check = |(number, (check, _)): (usize, &Outcome)| {
        let reports = || rounds.iter().filter_map(|round| round.get(number)).map(|(_, it)| it);
        let reason = reports().filter_map(|report| report.as_ref().err()).next_back();
        let mut sound = reports().filter_map(|report| report.as_ref().ok());
        let report = match (sound.next().cloned(), reason) {
            (Some(Some(mut report)), reason) => {
                let others: Vec<&Report> = sound.flatten().collect();
                report
                    .findings
                    .retain(|finding| others.iter().all(|other| other.findings.contains(finding)));
                match reason.filter(|_| others.is_empty() && !report.findings.is_empty()) {
                    Some(reason) => Err(format!("what it found could not be confirmed: {reason}")),
                    None => Ok(Some(report)),
                }
            }
            (None, Some(reason)) => Err(reason.clone()),
            _ => Ok(None),
        };
        (*check, report)
    };
    rounds.first().into_iter().flatten().enumerate().map(of_check).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use std::slice::from_ref;

    use kvmmem_client::admin::VcpuRegisters;
    use kvmmem_linux::integrity::Finding;

    use super::*;

    const REASON: &str = "cannot read gva 0x1000";

    pub(in crate::check) fn hidden(name: &str) -> Finding {
        let (found, missing) = ("the table of pids", "the lists of tasks");
        Finding::Hidden { name: name.to_owned(), gva: 0x1000, found, missing }
    }

    #[test]
    fn lstar_is_that_of_each_vcpu_that_runs_64_bit_code() {
        let vcpu = VcpuRegisters {
            cr0: 1 << 31,
            cr4: 1 << 5,
            efer: Some(0xd01),
            lstar: Some(0x1000),
            ..VcpuRegisters::default()
        };
        let (waiting, fred) = (
            VcpuRegisters { cr0: 0x10, ..vcpu.clone() },
            VcpuRegisters { cr4: vcpu.cr4 | FRED, ..vcpu.clone() },
        );
        let vcpus = vec![
            vcpu.clone(),
            waiting.clone(),
            fred,
            VcpuRegisters { lstar: Some(0x2000), ..vcpu.clone() },
        ];
        let values = lstars(&Ok(vcpus)).unwrap();
        let names = ["MSR_LSTAR of vCPU 0", "MSR_LSTAR of vCPU 3"].map(str::to_owned);
        assert_eq!(values, names.into_iter().zip([0x1000, 0x2000]).collect::<Vec<_>>());
        let by_monitor = VcpuRegisters { lstar: None, ..vcpu };
        for (registers, words) in [
            (Ok(vec![by_monitor]), "QEMU's monitor does not show it"),
            (Ok(vec![waiting]), "no vCPU"),
            (Err("a token opens memory alone".to_owned()), "a token"),
        ] {
            let reason = lstars(&registers).unwrap_err();
            assert!(reason.starts_with(words) && reason.ends_with("--lstar ADDRESS"), "{reason}");
        }
    }

    #[test]
    fn what_is_not_found_each_time_is_left_out() {
        let outcome = |findings| {
            vec![("tasks", Ok(Some(Report { examined: 3, findings }))), ("dispatcher", Ok(None))]
        };
        let first = outcome(vec![hidden("process 1 (a)"), hidden("process 2 (b)")]);
        let second = outcome(vec![hidden("process 3 (c)"), hidden("process 2 (b)")]);
        assert_eq!(combine(from_ref(&first)), first);
        let both = combine(&[first.clone(), second.clone()]);
        assert_eq!(both, outcome(vec![hidden("process 2 (b)")]));
        assert!(!is_sound(&both[0]) && is_sound(&both[1]));
        let sound = outcome(Vec::new());
        assert_eq!(combine(&[first, second, sound.clone()]), sound);
        let damaged = vec![("tasks", Err(REASON.to_owned())), ("dispatcher", Ok(None))];
        assert_eq!(combine(from_ref(&damaged)), damaged);
        for rounds in [[damaged.clone(), sound.clone()], [sound.clone(), damaged]] {
            assert_eq!(combine(&rounds), sound);
        }
    }

    #[test]
    fn what_is_found_in_one_round_alone_is_not_confirmed() {
        let found =
            || vec![("tasks", Ok(Some(Report { examined: 3, findings: vec![hidden("a")] })))];
        let damaged = || vec![("tasks", Err(REASON.to_owned()))];
        let reason = format!("what it found could not be confirmed: {REASON}");
        for rounds in [
            [found(), damaged(), damaged()],
            [damaged(), found(), damaged()],
            [damaged(), damaged(), found()],
        ] {
            assert_eq!(combine(&rounds), [("tasks", Err(reason.clone()))]);
        }
        for rounds in [[found(), damaged(), found()], [damaged(), found(), found()]] {
            assert_eq!(combine(&rounds), found());
        }
    }
}
