// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask test`: every test there is, from the quickest to the slowest.

use std::fs;
use std::io::{self, Write};

use anyhow::{Context as _, Result, bail};

use crate::bed::Bed;
use crate::binaries::Wanted;
use crate::cache::Cache;
use crate::ring::{self, Count, Finished, Ring};
use crate::tool::{Tool, is_installed};
use crate::{dist, libtest, project, source_check, ui, verbs};

/// Runs them all; returns whether nothing failed.
pub(crate) fn run() -> Result<bool> {
    let cache = Cache::open()?;
    let mut rings = vec![style(&cache)?, units(&cache)?, loom(&cache)?];
    let bed = Bed::make(Wanted::All);
    rings.push(dist::check::finish(&cache));
    let mut ring = Ring::new("module");
    match bed {
        Ok(bed) => {
            ring.check(bed.selftest());
            rings.push(ring.finish());
            rings.extend(end_to_end(&bed)?);
        }
        Err(error) => {
            ring.fail(&error);
            rings.push(ring.finish());
        }
    }
    Ok(ring::summary(&rings))
}

/// Formatting, lints and rules.
fn style(cache: &Cache) -> Result<Finished> {
    let mut ring = Ring::new("style");
    let cargo = |name: &str, args: &[&str]| {
        let log = cache.fresh_log(name)?;
        ui::step(name, || Tool::new(project::cargo(), &log).args(args).dir(project::root()).run())
    };
    ring.check(cargo("fmt", &["fmt", "--all", "--check"]));
    ring.check(cargo(
        "clippy",
        &["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"],
    ));
    ring.check(source_check::unsafe_code(project::root()).and_then(|found| {
        if found.is_empty() {
            Ok(())
        } else {
            bail!("unsafe code where there is to be none:\n  {}", found.join("\n  "))
        }
    }));
    if is_installed("cargo-deny") {
        ring.check(cargo("deny", &["deny", "--all-features", "check"]));
    } else {
        ring.skip("cargo deny is not installed: licences and advisories are not checked");
    }
    Ok(ring.finish())
}

/// Unit and property tests, and bare guests where there is a /dev/kvm.
fn units(cache: &Cache) -> Result<Finished> {
    let mut ring = Ring::new("unit");
    let log = cache.fresh_log("unit")?;
    let result = ui::step("cargo test --workspace", || {
        Tool::new(project::cargo(), &log)
            .args(["test", "--workspace", "--no-fail-fast", "--", "--show-output"])
            .dir(project::root())
            .run()
    });
    count(&mut ring, &log, result)?;
    Ok(ring.finish())
}

/// Every interleaving of the races, where a crate has such tests.
fn loom(cache: &Cache) -> Result<Finished> {
    let mut ring = Ring::new("loom");
    let mut crates: Vec<_> = fs::read_dir(project::root().join("crates"))?.collect::<io::Result<_>>()?;
    crates.sort_by_key(fs::DirEntry::file_name);
    for entry in crates.iter().filter(|entry| entry.path().join("tests/loom.rs").exists()) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let log = cache.fresh_log(&format!("loom-{name}"))?;
        // Flags of its own would rebuild everything else each time.
        let target = project::target(&log)?.join("loom");
        let result = ui::step(&format!("loom tests of {name}"), || {
            Tool::new(project::cargo(), &log)
                .args(["test", "--release", "--package", &name, "--test", "loom"])
                .env("RUSTFLAGS", "--cfg loom")
                .env("CARGO_TARGET_DIR", &target)
                .dir(project::root())
                .run()
        });
        count(&mut ring, &log, result)?;
    }
    Ok(ring.finish())
}

/// The scenarios, in two runs of the host: those of stock QEMUs boot many VMs.
fn end_to_end(bed: &Bed) -> Result<Vec<Finished>> {
    bed.describe();
    let list = verbs::list()?;
    let names = list.lines().filter_map(|line| line.split(' ').next()).map(str::to_owned);
    let (stock, ours): (Vec<_>, Vec<_>) = names.partition(|name| name.starts_with("qemu_"));
    let mut rings = vec![scenarios(bed, Ring::new("end to end"), &ours)];
    let mut ring = Ring::new("stock QEMU");
    if bed.has_qemus() {
        rings.push(scenarios(bed, ring, &stock));
    } else {
        ring.skip("only an emulated host has the QEMUs of other releases: KVMMEM_BED_WAY=nested cargo xtask e2e qemu");
        rings.push(ring.finish());
    }
    Ok(rings)
}

/// Some of them, in one run of the host.
fn scenarios(bed: &Bed, mut ring: Ring, names: &[String]) -> Finished {
    let mut tee = Tee::default();
    match bed.run(&verbs::e2e(names, false), &mut tee).and_then(|code| Ok((code, last_count(&tee.last)?))) {
        Ok((code, count)) => {
            ring.add(count);
            if code != 0 && count.failed == 0 {
                ring.fail(&anyhow::anyhow!("the scenarios ended with status {code}"));
            }
        }
        Err(error) => ring.fail(&error),
    }
    ring.finish()
}

/// Counts what a run of `cargo test` printed to its log.
fn count(ring: &mut Ring, log: &std::path::Path, result: Result<()>) -> Result<()> {
    let text = fs::read(log).with_context(|| log.display().to_string())?;
    let text = String::from_utf8_lossy(&text);
    let (count, reasons) = libtest::read(&text);
    for reason in reasons {
        ui::say(&format!("  skipped: {reason}"));
    }
    ring.add(count);
    match result {
        // It fails without a failed test where something does not compile or crashes.
        Err(error) if count.failed == 0 => ring.fail(&error),
        Err(error) => ui::say(&format!("  {error:#}")),
        Ok(()) if count == Count::default() => ring.fail(&anyhow::anyhow!("no test ran")),
        Ok(()) => {}
    }
    Ok(())
}

/// Passes bytes on to stdout and keeps the last of them.
#[derive(Default)]
struct Tee {
    last: Vec<u8>,
}

/// Bytes that a [`Tee`] keeps.
const KEPT: usize = 4096;

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let length = io::stdout().write(bytes)?;
        self.last.extend_from_slice(bytes.get(..length).unwrap_or_default());
        let excess = self.last.len().saturating_sub(KEPT);
        self.last.drain(..excess);
        Ok(length)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stdout().flush()
    }
}

/// The last line of the form `N passed, N failed[, N skipped]`.
fn last_count(text: &[u8]) -> Result<Count> {
    let text = String::from_utf8_lossy(text);
    text.lines().rev().find_map(counts).context("the scenarios ended without their counts")
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
    fn the_last_counts_are_found() {
        let text = b"1 passed, 2 failed\nnoise\n\n7 passed, 0 failed, 1 skipped\nmore noise, here\n";
        assert_eq!(last_count(text).unwrap(), Count { passed: 7, failed: 0, skipped: 1 });
        assert!(last_count(b"12 passed").is_ok());
        assert!(last_count(b"nothing, at all").is_err());
        assert!(last_count(b"").is_err());
    }
}
