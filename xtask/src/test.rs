// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask test`: runs all suites, from the quickest to the slowest. CI runs it.

use std::cell::OnceCell;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};
use std::{fs, io};

use anyhow::{Result, anyhow};
use clap::ValueEnum as _;

use crate::binaries::ProgramSet;
use crate::cache::Cache;
use crate::huge_pages::HugePages;
use crate::load::Load;
use crate::provision::{self, Purpose};
use crate::suite::{self, Name, Suite, SuiteResult};
use crate::test_bed::TestBed;
use crate::tool::Tool;
use crate::{disk, dist, interrupt, linux, project, scenarios, style, test_bed, tools, ui};

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
    /// The same as --only debug-kernel, which is skipped otherwise: it builds a kernel once
    #[arg(long)]
    debug_kernel: bool,
    /// Length of suite debug-kernel's random storm
    #[arg(long, value_name = "M", default_value_t = 1)]
    minutes: u32,
    /// Seed of that storm, to have one again; each run has its own if not given
    #[arg(long, value_name = "N")]
    seed: Option<u32>,
}

impl Options {
    /// The suites that search for an order of events that breaks a promise.
    pub(crate) fn models() -> Self {
        Self {
            repeat: 1,
            load: 0,
            only: vec![Name::Model, Name::Loom],
            debug_kernel: false,
            minutes: 1,
            seed: None,
        }
    }

    fn names_suites(&self) -> bool {
        self.debug_kernel || !self.only.is_empty()
    }

    fn wants(&self, name: Name) -> bool {
        !self.names_suites()
            || self.only.contains(&name)
            || self.debug_kernel && name == Name::DebugKernel
    }
}

/// Runs the suites that are wanted; returns whether nothing failed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let wanted: Vec<_> =
        Name::value_variants().iter().copied().filter(|name| options.wants(*name)).collect();
    let wants_bed = [Name::Module, Name::Tools, Name::Linux, Name::E2e, Name::Qemu]
        .iter()
        .any(|name| wanted.contains(name));
    let cache = Cache::open()?;
    for folder in [&project::target(&cache.fresh_log("metadata")?)?, cache.folder()] {
        disk::has_room(folder)?;
    }
    let runner = Runner { cache, options, wants_bed, bed: OnceCell::new() };
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
struct Runner<'a> {
    cache: Cache,
    options: &'a Options,
    wants_bed: bool,
    /// Made when a suite first needs it.
    bed: OnceCell<Result<TestBed, String>>,
}

impl Runner<'_> {
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
                Name::Style | Name::Model | Name::Loom | Name::Packages | Name::DebugKernel => {}
            }
        }
        Ok(())
    }

    fn bed(&self) -> Result<&TestBed> {
        let made = self.bed.get_or_init(|| {
            let bed = TestBed::make(ProgramSet::All).inspect(TestBed::describe);
            bed.map_err(|error| format!("{error:#}"))
        });
        made.as_ref().map_err(|error| anyhow!("no test bed: {error}"))
    }

    fn suite(&self, name: Name) -> Result<SuiteResult> {
        if name == Name::Packages && self.wants_bed {
            // With it the module can be built from its package. If it cannot be made, the suites
            // that need it report that.
            let _ = self.bed();
        }
        let mut suite = Suite::new(name);
        match name {
            Name::Style => style::run(&self.cache, &mut suite)?,
            Name::Unit => units(&self.cache, &mut suite)?,
            Name::Model => model(&self.cache, &mut suite)?,
            Name::Loom => loom(&self.cache, &mut suite)?,
            Name::Packages => dist::check::run(&self.cache, &mut suite),
            Name::DebugKernel if self.options.names_suites() => self.debug_kernel(&mut suite),
            Name::DebugKernel => suite.skip(
                "kernel/selftest in a debug kernel, which takes 10 minutes to build: \
                 cargo xtask test --debug-kernel",
            ),
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

    fn debug_kernel(&self, suite: &mut Suite) {
        let seed = self.options.seed.unwrap_or_else(|| {
            SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().subsec_nanos()
        });
        let minutes = self.options.minutes;
        let result = test_bed::selftest_in_debug_kernel(&self.cache, minutes, seed);
        suite.check(&format!("kernel/selftest in a debug kernel, seed {seed}"), result);
    }
}

/// Unit and property tests, and bare guests where there is a /dev/kvm.
fn units(cache: &Cache, suite: &mut Suite) -> Result<()> {
    // Some tests use the test bed's programs; where those cannot be installed, the tests are
    // skipped and report it.
    let lock = cache.lock()?;
    if let Err(error) = provision::provision(cache, Purpose::TestBed) {
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
    suite.cargo_test(&log, result)
}

fn unit(log: &Path) -> Tool {
    Tool::new(project::cargo(), log).args(["test", "--workspace"]).dir(project::root())
}

/// Every order of what happens to the broker's core; `unit` explores a smaller one.
fn model(cache: &Cache, suite: &mut Suite) -> Result<()> {
    let log = cache.fresh_log("model")?;
    let result = ui::step("the model of the broker's core", || {
        Tool::new(project::cargo(), &log)
            .args(["test", "--release", "--package", "kvmmem-broker", "--lib", "core::model"])
            .args(["--", "--include-ignored", "--nocapture"])
            .dir(project::root())
            .run()
    });
    suite.cargo_test(&log, result)
}

/// Every interleaving of the races, where a crate has such tests: by its interface, or of its own
/// parts.
fn loom(cache: &Cache, suite: &mut Suite) -> Result<()> {
    const TESTS: [(&str, &[&str]); 2] =
        [("tests/loom.rs", &["--test", "loom"]), ("src/loom_tests.rs", &["--lib", "loom_tests::"])];
    let mut crates: Vec<_> =
        fs::read_dir(project::root().join("crates"))?.collect::<io::Result<_>>()?;
    crates.sort_by_key(fs::DirEntry::file_name);
    let tests = crates.iter().flat_map(|entry| TESTS.map(|(file, args)| (entry, file, args)));
    for (entry, _, args) in tests.filter(|(entry, file, _)| entry.path().join(file).exists()) {
        let name = entry.file_name().to_string_lossy().into_owned();
        let log = cache.fresh_log(&format!("loom-{name}"))?;
        // Flags of its own would rebuild everything else each time.
        let target = project::target(&log)?.join("loom");
        let result = ui::step(&format!("loom tests of {name}"), || {
            Tool::new(project::cargo(), &log)
                .args(["test", "--release", "--package", &name])
                .args(args)
                .env("RUSTFLAGS", "--cfg loom")
                .env("CARGO_TARGET_DIR", &target)
                .dir(project::root())
                .run()
        });
        suite.cargo_test(&log, result)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn wanted(words: &[&str]) -> Vec<Name> {
        let line = Line::parse_from(["test"].iter().chain(words));
        let names = Name::value_variants().iter().copied();
        names.filter(|name| line.options.wants(*name)).collect()
    }

    #[test]
    fn the_debug_kernel_alone_is_one_suite() {
        assert_eq!(wanted(&[]), Name::value_variants());
        assert_eq!(wanted(&["--debug-kernel"]), [Name::DebugKernel]);
        assert_eq!(wanted(&["--only", "debug-kernel"]), [Name::DebugKernel]);
        assert_eq!(wanted(&["--only", "unit", "--debug-kernel"]), [Name::Unit, Name::DebugKernel]);
    }
}
