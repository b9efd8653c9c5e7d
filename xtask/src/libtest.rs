// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Parser of `cargo test`'s output: counts, failures and reasons for skipped tests.

use crate::suite::Count;

/// What came of all its test programs.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) count: Count,
    /// Why tests were skipped, each reason once.
    pub(crate) reasons: Vec<String>,
    /// The tests that failed: program and test.
    pub(crate) failures: Vec<String>,
}

/// Reads the log of a run.
///
/// The harness knows no skipped tests: one that finds its machine wanting prints `skipped: WHY` and
/// passes.
pub(crate) fn read(text: &str) -> Outcome {
    let mut outcome = Outcome::default();
    let mut skipped = 0;
    let mut program = "";
    // The harness lists the failed tests last, after a section of the same title with what they
    // printed.
    let mut listed: Option<Vec<&str>> = None;
    let mut is_open = false;
    for line in text.lines() {
        if let Some(next) = program_of(line) {
            outcome.end_early(is_open, program);
            (program, is_open, listed) = (next, false, None);
        } else if line.starts_with("running ")
            && (line.ends_with(" test") || line.ends_with(" tests"))
        {
            is_open = true;
        } else if let Some(result) = line.strip_prefix("test result: ") {
            outcome.count += counts(result);
            let names = listed.take().unwrap_or_default();
            outcome.failures.extend(names.iter().map(|name| format!("{program} {name}")));
            is_open = false;
        } else if line == "failures:" {
            listed = Some(Vec::new());
        } else if let Some(reason) = line.trim_start().strip_prefix("skipped: ") {
            skipped += 1;
            if !outcome.reasons.iter().any(|known| known == reason) {
                outcome.reasons.push(reason.to_owned());
            }
        } else if let (Some(listed), Some(name)) = (&mut listed, line.strip_prefix("    ")) {
            listed.push(name);
        }
    }
    outcome.end_early(is_open, program);
    let skipped = outcome.count.passed.min(skipped);
    outcome.count.passed -= skipped;
    outcome.count.skipped += skipped;
    outcome
}

impl Outcome {
    /// Counts a program that ended before it had printed its result: it crashed.
    fn end_early(&mut self, is_open: bool, program: &str) {
        if is_open {
            self.count.failed += 1;
            self.failures.push(format!("{program} (ended before its tests had)"));
        }
    }
}

/// The program that runs, from a line of cargo's output.
fn program_of(line: &str) -> Option<&str> {
    let line = line.trim_start();
    if let Some(package) = line.strip_prefix("Doc-tests ") {
        return Some(package);
    }
    let path = line.strip_prefix("Running ")?.strip_suffix(')')?.rsplit_once('(')?.1;
    let file = path.rsplit_once('/').map_or(path, |(_, file)| file);
    // Cargo's hash follows the last hyphen.
    Some(file.rsplit_once('-').map_or(file, |(name, _)| name))
}

fn counts(result: &str) -> Count {
    let mut count = Count::default();
    for part in result.split(['.', ';']) {
        if let Some((number, what)) = part.trim().split_once(' ') {
            let number = number.parse().unwrap_or(0);
            match what {
                "passed" => count.passed += number,
                "failed" => count.failed += number,
                "ignored" => count.skipped += number,
                _ => {}
            }
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_added_up_and_skipped_tests_do_not_count_as_passed() {
        let text = "\
running 3 tests
skipped: no /dev/kvm
test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s
running 6 tests
  skipped: no /dev/kvm
test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s
";
        let outcome = read(text);
        assert_eq!(outcome.count, Count { passed: 5, failed: 2, skipped: 3 });
        assert_eq!(outcome.reasons, ["no /dev/kvm"]);
    }

    #[test]
    fn failed_tests_are_named_with_their_program() {
        let text = "
     Running unittests src/lib.rs (target/debug/deps/kvmmem_abi-0123abcd)

running 1 test
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s

     Running tests/views.rs (target/debug/deps/views-0123abcd)

running 3 tests
test one ... FAILED
test two ... ok

successes:

---- two stdout ----
    an indented line

successes:
    two

failures:

---- one stdout ----
    another one

failures:
    one
    part::three

test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s

error: test failed, to rerun pass `-p kvmmem-broker --test views`
   Doc-tests kvmmem
";
        assert_eq!(read(text).failures, ["views one", "views part::three"]);
    }

    #[test]
    fn a_program_that_crashes_has_failed() {
        let text = "
     Running tests/views.rs (target/debug/deps/views-0123abcd)
running 2 tests
test one ... ok
     Running tests/other.rs (target/debug/deps/other-0123abcd)
running 1 test
test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s
";
        let outcome = read(text);
        assert_eq!(outcome.count, Count { passed: 1, failed: 1, skipped: 0 });
        assert_eq!(outcome.failures, ["views (ended before its tests had)"]);
    }
}
