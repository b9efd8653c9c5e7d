// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask test`: every test there is, from the quickest to the slowest.

use std::cell::OnceCell;
use std::path::Path;
use std::time::SystemTime;
use std::{fs, io};

use anyhow::{Context as _, Result, anyhow, bail};
use clap::ValueEnum as _;

use crate::bed::Bed;
use crate::binaries::Wanted;
use crate::cache::Cache;
use crate::huge_pages::HugePages;
use crate::load::Load;
use crate::provision::{self, Purpose};
use crate::suite::{self, Count, Finished, Name, Suite};
use crate::tool::Tool;
use crate::{
    crate_graph, deny, dist, interrupt, libtest, linux, module_format, project, scenarios,
    source_check, tools, ui,
};

/// Which tests, and how.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Run them this many times
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// Keep this many processes busy beside them
    #[arg(long, value_name = "M", default_value_t = 0)]
    load: u32,
    /// Run this suite alone; may be repeated
    #[arg(long, value_name = "SUITE")]
    only: Vec<Name>,
}

/// Runs the suites that are wanted; returns whether nothing failed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let is_wanted = |name: &Name| options.only.is_empty() || options.only.contains(name);
    let wanted: Vec<_> = Name::value_variants().iter().copied().filter(is_wanted).collect();
    let wants_bed = [Name::Module, Name::Tools, Name::Linux, Name::E2e, Name::Qemu]
        .iter()
        .any(|name| wanted.contains(name));
    let runner = Runner { cache: Cache::open()?, wants_bed, bed: OnceCell::new() };
    if options.load > 0 {
        runner.prepare(&wanted)?;
    }
    let load = Load::start(options.load)?;
    let mut suites = Vec::new();
    'rounds: for round in 1..=options.repeat {
        if options.repeat > 1 {
            ui::say(&format!("\nround {round} of {}", options.repeat));
        }
        for name in &wanted {
            suite::merge(&mut suites, round, runner.suite(*name)?);
            if interrupt::was_seen() {
                break 'rounds;
            }
        }
    }
    drop(load);
    Ok(suite::summary(&suites) && !interrupt::was_seen())
}

/// What the suites run with.
struct Runner {
    cache: Cache,
    wants_bed: bool,
    /// Made when a suite first needs it.
    bed: OnceCell<Result<Bed, String>>,
}

impl Runner {
    /// Builds what the suites need, so that their rounds only run it.
    fn prepare(&self, wanted: &[Name]) -> Result<()> {
        for name in wanted {
            match name {
                Name::Unit => {
                    let log = self.cache.fresh_log("unit")?;
                    ui::step("cargo test --workspace --no-run", || {
                        unit(&log).arg("--no-run").run()
                    })?;
                }
                Name::Module | Name::Tools | Name::Linux | Name::E2e | Name::Qemu => {
                    self.bed()?;
                }
                Name::Style | Name::Loom | Name::Packages => {}
            }
        }
        Ok(())
    }

    fn bed(&self) -> Result<&Bed> {
        let made = self.bed.get_or_init(|| {
            let bed = Bed::make(Wanted::All).inspect(Bed::describe);
            bed.map_err(|error| format!("{error:#}"))
        });
        made.as_ref().map_err(|error| anyhow!("no test bed: {error}"))
    }

    fn suite(&self, name: Name) -> Result<Finished> {
        if name == Name::Packages && self.wants_bed {
            // With it the module can be built from its package. If it cannot be made, those that
            // need it say so.
            let _ = self.bed();
        }
        let mut suite = Suite::new(name);
        match name {
            Name::Style => style(&self.cache, &mut suite)?,
            Name::Unit => units(&self.cache, &mut suite)?,
            Name::Loom => loom(&self.cache, &mut suite)?,
            Name::Packages => dist::check::run(&self.cache, &mut suite),
            Name::Module | Name::Tools | Name::Linux | Name::E2e | Name::Qemu => match self.bed() {
                Ok(bed) if name == Name::Tools => tools::run(&self.cache, bed, &mut suite)?,
                Ok(bed) if name == Name::Linux => linux::run(&self.cache, bed, &mut suite)?,
                Ok(bed) if name == Name::Module => suite.check("kernel/selftest", bed.selftest()),
                Ok(bed) => scenarios::run(bed, &mut suite, name)?,
                Err(error) => suite.fail("the test bed is made", &error),
            },
        }
        Ok(suite.finish())
    }
}

/// Formatting, lints and rules.
fn style(cache: &Cache, suite: &mut Suite) -> Result<()> {
    let cargo = |name: &str, args: &[&str]| {
        let log = cache.fresh_log(name)?;
        ui::step(name, || Tool::new(project::cargo(), &log).args(args).dir(project::root()).run())
    };
    suite.check("fmt", cargo("fmt", &["fmt", "--all", "--check"]));
    suite.check("fmt of the module", module_format::check(&project::root().join("kernel")));
    let lints = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
    suite.check("clippy", cargo("clippy", &lints));
    // A workspace of its own, which only cargo-fuzz builds otherwise.
    let fuzz = ["--manifest-path", "fuzz/Cargo.toml"];
    suite.check("fmt of fuzz", cargo("fmt-fuzz", &[&["fmt"], &fuzz[..], &["--check"]].concat()));
    let lints =
        ["--no-default-features", "--target-dir", "target", "--quiet", "--", "-D", "warnings"];
    suite.check("clippy of fuzz", cargo("clippy-fuzz", &[&["clippy"], &fuzz[..], &lints].concat()));
    let unsafe_code = source_check::unsafe_code(project::root()).and_then(|found| {
        if found.is_empty() {
            Ok(())
        } else {
            bail!("unsafe code where there is to be none:\n  {}", found.join("\n  "))
        }
    });
    suite.check("unsafe code is where it may be", unsafe_code);
    let dependencies = crate_graph::forbidden(&cache.fresh_log("crate-graph")?).and_then(|found| {
        if found.is_empty() {
            Ok(())
        } else {
            bail!(
                "dependencies that xtask/src/crate_graph.rs does not allow:\n  {}",
                found.join("\n  ")
            )
        }
    });
    suite.check("no tool links the broker", dependencies);
    deny::check(cache, suite)
}

/// Unit and property tests, and bare guests where there is a /dev/kvm.
fn units(cache: &Cache, suite: &mut Suite) -> Result<()> {
    // Some tests use the test bed's programs; where those cannot be installed, they are skipped and
    // say so.
    let lock = cache.lock()?;
    if let Err(error) = provision::provision(cache, Purpose::Bed) {
        ui::say(&format!("  {error:#}"));
    }
    drop(lock);
    let log = cache.fresh_log("unit")?;
    // Without them some tests are skipped.
    let _huge_pages = HugePages::reserve(&log)
        .inspect_err(|error| ui::say(&format!("  no huge pages: {error:#}")))
        .ok();
    let result = ui::step("cargo test --workspace", || {
        unit(&log).args(["--no-fail-fast", "--", "--show-output"]).run()
    });
    count(suite, &log, result)
}

fn unit(log: &Path) -> Tool {
    Tool::new(project::cargo(), log).args(["test", "--workspace"]).dir(project::root())
}

/// Every interleaving of the races, where a crate has such tests.
fn loom(cache: &Cache, suite: &mut Suite) -> Result<()> {
    let mut crates: Vec<_> =
        fs::read_dir(project::root().join("crates"))?.collect::<io::Result<_>>()?;
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
        count(suite, &log, result)?;
    }
    Ok(())
}

/// Counts what a run of `cargo test` printed to its log.
fn count(suite: &mut Suite, log: &Path, result: Result<()>) -> Result<()> {
    let text = fs::read(log).with_context(|| log.display().to_string())?;
    let outcome = libtest::read(&String::from_utf8_lossy(&text));
    for reason in &outcome.reasons {
        ui::say(&format!("  skipped: {reason}"));
    }
    suite.add(outcome.count, outcome.failures);
    if result.is_err() {
        // The next round overwrites the log.
        let time =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        let kept = log.with_extension(format!("failed-{time}.log"));
        fs::copy(log, &kept).with_context(|| kept.display().to_string())?;
        ui::say(&format!("  kept: {}", kept.display()));
    }
    match result {
        // It fails without a failed test where something does not compile.
        Err(error) if outcome.count.failed == 0 => suite.fail("cargo test", &error),
        Err(error) => ui::say(&format!("  {error:#}")),
        Ok(()) if outcome.count == Count::default() => {
            suite.fail("cargo test", &anyhow!("no test ran"))
        }
        Ok(()) => {}
    }
    Ok(())
}
