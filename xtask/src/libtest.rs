// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads what `cargo test` prints.

use crate::ring::Count;

/// Counts of all its test programs, and what was skipped.
///
/// The harness knows no skipped tests: one that finds its machine wanting prints `skipped: WHY` and passes.
pub(crate) fn read(text: &str) -> (Count, Vec<&str>) {
    let mut count = Count::default();
    let mut reasons: Vec<&str> = Vec::new();
    let mut skipped = 0;
    for line in text.lines() {
        if let Some(result) = line.strip_prefix("test result: ") {
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
        } else if let Some(reason) = line.trim_start().strip_prefix("skipped: ") {
            skipped += 1;
            if !reasons.contains(&reason) {
                reasons.push(reason);
            }
        }
    }
    let skipped = count.passed.min(skipped);
    count.passed -= skipped;
    count.skipped += skipped;
    (count, reasons)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_added_up_and_skipped_tests_are_no_passed_ones() {
        let text = "\
running 3 tests
skipped: no /dev/kvm
test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s
  skipped: no /dev/kvm
test result: FAILED. 4 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s
";
        let (count, reasons) = read(text);
        assert_eq!(count, Count { passed: 5, failed: 2, skipped: 3 });
        assert_eq!(reasons, ["no /dev/kvm"]);
    }
}
