// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The end-to-end suites: runs scenarios on the test bed's host, and reads what they print.

use std::io::{self, Write};

use anyhow::{Context as _, Result, anyhow};

use crate::suite::{Count, Name, Suite};
use crate::test_bed::TestBed;
use crate::verbs;

/// Runs the scenarios of suite `name` in one run of the host. Those of stock QEMUs run by
/// themselves: they boot many VMs, on another host.
pub(crate) fn run(bed: &TestBed, suite: &mut Suite, name: Name) -> Result<()> {
    if name == Name::Qemu && !bed.has_qemus() {
        suite.skip(
            "only an emulated host has the QEMUs of other releases: KVMMEM_TEST_BED_HOST=nested cargo xtask test --only qemu",
        );
        return Ok(());
    }
    let list = verbs::list()?;
    let names = list.lines().filter_map(|line| line.split(' ').next());
    let names: Vec<_> = names
        .filter(|scenario| {
            verbs::STOCK_QEMUS.iter().any(|part| scenario.starts_with(part)) == (name == Name::Qemu)
        })
        .map(str::to_owned)
        .collect();
    let mut output = Output::default();
    let ended = bed.run(&verbs::e2e(&names, false), &mut output);
    // Also where the run ended early.
    let failures = std::mem::take(&mut output.failures);
    let counted = output.count.context("the scenarios ended without their counts");
    match ended.and_then(|code| Ok((code, counted?))) {
        Ok((code, count)) => {
            suite.add(count, failures);
            if code != 0 && count.failed == 0 {
                suite.fail("the run", &anyhow!("the scenarios ended with status {code}"));
            }
        }
        Err(error) => {
            let failed = u64::try_from(failures.len()).unwrap_or(u64::MAX);
            suite.add(Count { failed, ..Count::default() }, failures);
            suite.fail("the run", &error);
        }
    }
    Ok(())
}

/// Passes what the scenarios print on to stdout, and reads it.
#[derive(Default)]
struct Output {
    /// What came since the last line's end.
    rest: Vec<u8>,
    /// The failed checks, each with its scenario.
    failures: Vec<String>,
    /// From the last line of the form `N passed, N failed[, N skipped]`.
    count: Option<Count>,
}

impl Output {
    fn read(&mut self, bytes: &[u8]) {
        self.rest.extend_from_slice(bytes);
        while let Some(end) = self.rest.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = self.rest.drain(..=end).collect();
            let line = String::from_utf8_lossy(&line);
            if let Some(failure) = line.strip_prefix("failed: ") {
                self.failures.push(failure.trim_end().to_owned());
            }
            self.count = counts(&line).or(self.count);
        }
    }
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = io::stdout().write(bytes)?;
        self.read(bytes.get(..length).unwrap_or_default());
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

fn counts(line: &str) -> Option<Count> {
    let mut count = Count::default();
    for part in line.split(',') {
        let (number, what) = part.trim().split_once(' ')?;
        let number = number.parse().ok()?;
        match what {
            "passed" => count.passed = number,
            "failed" => count.failed = number,
            "skipped" => count.skipped = number,
            _ => return None,
        }
    }
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_counts_and_the_failures_are_found() {
        let mut output = Output::default();
        for piece in [
            "1 passed, 2 failed\nnoise\n\nfai",
            "led: map: it is mapped\n7 pas",
            "sed, 1 failed, 1 skipped\nx, y\n",
        ] {
            output.read(piece.as_bytes());
        }
        assert_eq!(output.count, Some(Count { passed: 7, failed: 1, skipped: 1 }));
        assert_eq!(output.failures, ["map: it is mapped"]);
        let mut output = Output::default();
        output.read(b"nothing, at all\n");
        assert_eq!(output.count, None);
    }
}
