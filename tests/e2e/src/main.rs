// SPDX-License-Identifier: Apache-2.0 OR MIT
//! End-to-end scenarios, the demo, `try` and the bench: what runs on a KVM host, real or emulated.
//!
//! `cargo xtask` makes the test bed that `KVMMEM_TEST_BED` names and runs this program where
//! `/dev/kvm` is.
#![deny(unsafe_code)]

mod bench;
mod demo;
mod internal_error;
mod process;
mod qemu;
mod qmp;
mod raw;
mod report;
mod scenarios;
mod sparse;
mod test_bed;
mod try_program;
mod vm;
mod wait;
mod world;

use std::ffi::OsString;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, bail};
use clap::Parser;

use crate::report::{Report, Style};
use crate::scenarios::{all, is_named};
use crate::test_bed::TestBed;
use crate::vm::Way;
use crate::world::World;

#[derive(Parser)]
#[command(name = "kvmmem-e2e", about)]
enum Verb {
    /// List the scenarios.
    List,
    /// Run scenarios, all of them if none is named.
    Run {
        /// One JSON object a check.
        #[arg(long)]
        json: bool,
        /// Their names.
        names: Vec<String>,
    },
    /// The demo.
    Demo,
    /// Run a program in an introspector.
    Try(try_program::Arguments),
    /// Measure v1.
    Bench(bench::Arguments),
    /// Become a program of the system in a folder.
    #[command(hide = true)]
    Enter {
        /// The folder.
        root: PathBuf,
        /// The program and its arguments.
        #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<OsString>,
    },
}

fn main() -> ExitCode {
    let outcome = match Verb::parse() {
        Verb::List => {
            for scenario in all() {
                println!("{:<24} {}", scenario.name, scenario.purpose);
            }
            Ok(0)
        }
        Verb::Run { json, names } => run(if json { Style::Json } else { Style::Text }, &names),
        Verb::Demo => demo::run(),
        Verb::Try(arguments) => try_program::run(&arguments),
        Verb::Bench(arguments) => bench::run(&arguments),
        Verb::Enter { root, command } => Err(enter(&root, &command)),
    };
    match outcome {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("kvmmem-e2e: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Returns only if it failed.
fn enter(root: &Path, command: &[OsString]) -> anyhow::Error {
    let become_it = || -> Result<()> {
        let (program, arguments) = command.split_first().context("no program")?;
        std::os::unix::fs::chroot(root)
            .with_context(|| format!("cannot enter {}", root.display()))?;
        std::env::set_current_dir("/").context("cannot enter the folder")?;
        let error = Command::new(program).args(arguments).exec();
        Err(error).with_context(|| format!("cannot run {}", program.display()))
    };
    become_it().err().unwrap_or_else(|| anyhow::anyhow!("no program"))
}

fn run(style: Style, names: &[String]) -> Result<u8> {
    if let Some(unknown) = names.iter().find(|name| !all().any(|scenario| is_named(scenario, name)))
    {
        bail!("no scenario is named {unknown:?}; `cargo xtask e2e --list` lists them");
    }
    let mut report = Report::new(style);
    let mut world = World::without_vms(TestBed::from_env()?)?;
    for scenario in all()
        .filter(|scenario| names.is_empty() || names.iter().any(|name| is_named(scenario, name)))
    {
        report.begin(scenario.name, scenario.purpose);
        let before = report.failed();
        world.use_way(Way::Auto);
        // Those of stock QEMUs boot what they need themselves.
        let boots = ["qemu", "moduleless"].iter().any(|part| is_named(scenario, part));
        let mended = if boots { Ok(()) } else { world.mend() };
        let outcome = mended.and_then(|()| (scenario.run)(&mut world, &mut report));
        if let Err(error) = outcome {
            let detail = format!("{error:#}{}", world.internal_errors());
            report.check("the scenario runs to its end", false, detail);
        }
        if report.failed() > before {
            report.say(&world.logs());
            // What failed here must not fail the scenarios after it.
            world.renew()?;
        }
    }
    for check in report.checks().iter().filter(|check| !check.ok) {
        report.say(&format!("failed: {}: {} ({})", check.scenario, check.what, check.detail));
    }
    report.say(&format!("\n{} passed, {} failed", report.passed(), report.failed()));
    Ok(u8::from(report.failed() > 0))
}
