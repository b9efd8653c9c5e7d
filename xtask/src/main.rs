// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask`: tests, benchmarks, packages and the demo, and the test bed they run on.
//!
//! Each verb is a module; [`mod@test`] and [`check`] run the suites, [`test_bed`] makes what the
//! VMs need.

#![deny(unsafe_code)]

mod answers;
mod binaries;
mod cache;
mod changes;
mod check;
mod clean;
mod cpio;
mod crate_graph;
mod debug_kernel;
mod deny;
mod depends;
mod direct;
mod disk;
mod dist;
mod doc_check;
mod elf;
mod file_graph;
mod host_kind;
mod huge_pages;
mod initramfs;
mod interrupt;
mod kernel;
mod libtest;
mod linux;
mod load;
mod mirror;
mod module;
mod module_format;
mod monitor;
mod nested;
mod plot;
mod process;
mod project;
mod prose_check;
mod provision;
mod public_items;
mod qemus;
mod release;
mod root;
mod scenarios;
mod source_check;
mod style;
mod suite;
mod test;
mod test_bed;
mod tool;
mod tools;
mod tree;
mod ui;
mod verbs;
mod workspace;

use std::io::stdout;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand, ValueEnum};

use crate::binaries::ProgramSet;
use crate::test_bed::{Job, TestBed};

/// Test bed, demo, benchmarks and tests of kvmmem.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Boot a target and an introspector, and show what the project does
    Demo,
    /// Check format, lints and the tests of what changed; takes a minute or two
    Check(check::Options),
    /// Run every test there is
    Test(test::Options),
    /// Explore every order of what happens to the broker's core, and every interleaving of the
    /// races
    Model,
    /// Run end-to-end scenarios: all of them, or those named
    E2e {
        /// List the scenarios
        #[arg(long)]
        list: bool,
        /// Print one JSON object a check
        #[arg(long)]
        json: bool,
        /// Scenarios
        names: Vec<String>,
    },
    /// Run a static program of your own in an introspector
    Try {
        /// A file to be next to the program; may be repeated
        #[arg(long = "file", value_name = "PATH")]
        files: Vec<PathBuf>,
        /// The program and its arguments
        #[arg(last = true, required = true, value_name = "PROGRAM ARGS")]
        command: Vec<String>,
    },
    /// Measure
    Bench {
        /// What
        what: Bench,
        /// Print one JSON object a line
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        answers: answers::Options,
    },
    /// Draw what `bench --json` printed, read from standard input, as an SVG
    Plot {
        /// The drawing
        file: PathBuf,
    },
    /// Make everything that the test VMs need, and list it
    Testbed,
    /// Build kvmmem.ko only, and print where it is
    Module,
    /// Run a static program on the test bed's KVM host, which has the kernel and the initramfs of a
    /// guest in /bed
    Host {
        /// A file to be next to the program; may be repeated
        #[arg(long = "file", value_name = "PATH")]
        files: Vec<PathBuf>,
        /// Stop after this many seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        limit: u64,
        /// The program and its arguments
        #[arg(last = true, required = true, value_name = "PROGRAM ARGS")]
        command: Vec<String>,
    },
    /// Make Debian packages
    Dist {
        /// Where to: `dist` in cargo's target folder if not given
        folder: Option<PathBuf>,
        /// Distinguishes packages of the same version
        #[arg(long, value_name = "NUMBER", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..))]
        revision: u32,
        /// Make them, and try them in a clean Debian system, instead
        #[arg(long, conflicts_with_all = ["folder", "revision"])]
        check: bool,
    },
    /// Empty the cache
    Clean,
    /// Keep a CPU busy until the process of this id ends
    #[command(hide = true, name = load::VERB)]
    Busy {
        /// The process
        parent: i32,
    },
}

#[derive(Clone, Copy, ValueEnum)]
enum Bench {
    /// v1: single pages
    V1,
    /// Views
    Views,
    /// Views in introspectors under stock QEMUs
    Qemu,
    /// VM exits of each operation
    Exits,
    /// The broker with 1,000 targets and 10,000 grants; needs no VM
    Broker,
    /// Searches of a target's memory; needs no VM
    Scan,
    /// The command's answers about a Linux guest, against drgn, volatility3 and QEMU's own dump
    Answers,
}

fn main() -> ExitCode {
    match run(Arguments::parse().verb) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<i32> {
    match verb {
        Verb::Demo => on_host(ProgramSet::All, &verbs::demo()),
        Verb::Check(options) => Ok(i32::from(!check::run(&options)?)),
        Verb::Test(options) => Ok(i32::from(!test::run(&options)?)),
        Verb::Model => Ok(i32::from(!test::run(&test::Options::models())?)),
        Verb::Busy { parent } => load::busy(parent),
        Verb::E2e { list: true, .. } => {
            print!("{}{}", verbs::list()?, linux::LISTED);
            Ok(0)
        }
        Verb::E2e { list: false, json: _, names } if names == [linux::SCENARIO] => {
            Ok(i32::from(!linux::run_alone()?))
        }
        Verb::E2e { list: false, json, names } => {
            verbs::check(&names)?;
            on_host(ProgramSet::All, &verbs::e2e(&names, json))
        }
        Verb::Try { files, command } => {
            on_host(ProgramSet::All, &verbs::try_program(files, command)?)
        }
        Verb::Bench { what, answers, .. }
            if !matches!(what, Bench::Answers) && answers.is_given() =>
        {
            anyhow::bail!("--file, --rounds and --debug-information are options of bench answers")
        }
        Verb::Bench { what: Bench::Answers, json, answers } => {
            answers::run(&answers, json).map(|()| 0)
        }
        Verb::Bench { what: Bench::V1, json, .. } => {
            print!("{}", verbs::bench_here("kvmmem-broker", "kvmi_read", json)?);
            on_host(ProgramSet::All, &verbs::bench("v1", json))
        }
        Verb::Bench { what: Bench::Views, json, .. } => {
            print!("{}", verbs::bench_here("kvmmem", "host_read", json)?);
            print!("{}", verbs::bench_here("kvmmem", "host_scan", json)?);
            on_host(ProgramSet::All, &verbs::bench("views", json))
        }
        Verb::Bench { what: Bench::Qemu, json, .. } => {
            on_host(ProgramSet::All, &verbs::bench("qemu", json))
        }
        Verb::Bench { what: Bench::Exits, json, .. } => {
            on_host(ProgramSet::All, &verbs::bench("exits", json))
        }
        Verb::Bench { what: Bench::Broker, json, .. } => {
            print!("{}", verbs::bench_here("kvmmem-broker", "crowd", json)?);
            Ok(0)
        }
        Verb::Bench { what: Bench::Scan, json, .. } => {
            print!("{}", verbs::bench_here("kvmmem-cli", "scan", json)?);
            Ok(0)
        }
        Verb::Plot { file } => plot::run(&file).map(|()| 0),
        Verb::Testbed => {
            TestBed::make(ProgramSet::All)?.describe();
            Ok(0)
        }
        Verb::Module => {
            println!("{}", test_bed::make_module()?.display());
            Ok(0)
        }
        Verb::Host { files, limit, command } => {
            on_host(ProgramSet::Init, &verbs::host(files, command, Duration::from_secs(limit))?)
        }
        Verb::Dist { check: true, .. } => Ok(i32::from(!dist::check::run_alone()?)),
        Verb::Dist { folder, revision, .. } => {
            for package in dist::run(folder, revision)? {
                println!("{}", package.display());
            }
            Ok(0)
        }
        Verb::Clean => clean::run().map(|()| 0),
    }
}

fn on_host(wanted: ProgramSet, job: &Job) -> Result<i32> {
    TestBed::make(wanted)?.run(job, &mut stdout())
}
