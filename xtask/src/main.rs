// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask`: the test bed, the demo and all tests.

#![deny(unsafe_code)]

mod bed;
mod binaries;
mod cache;
mod cpio;
mod depends;
mod initramfs;
mod kernel;
mod l1;
mod mirror;
mod module;
mod project;
mod provision;
mod release;
mod root;
mod tool;
mod ui;
mod way;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::bed::{Bed, Job};
use crate::binaries::Wanted;

/// Test bed, demo and tests of kvmmem.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Make all that the test VMs are made of, and say what is there
    Testbed,
    /// Build kvmmem.ko only
    Module,
    /// Run a program on the bed's KVM host, without any VM
    Host {
        /// A file for the host, put next to the program; may be repeated
        #[arg(long = "file", value_name = "PATH")]
        files: Vec<PathBuf>,
        /// Stop after this many seconds
        #[arg(long, value_name = "SECONDS", default_value_t = 600)]
        limit: u64,
        /// A static program and its arguments
        #[arg(last = true, required = true, value_name = "PROGRAM ARGS")]
        command: Vec<String>,
    },
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
        Verb::Testbed => Bed::make(Wanted::All)?.describe(),
        Verb::Module => println!("{}", bed::make_module()?.display()),
        Verb::Host { files, limit, command } => {
            return Bed::make(Wanted::Init)?.run(&host_job(files, limit, command)?);
        }
    }
    Ok(0)
}

fn host_job(mut files: Vec<PathBuf>, limit: u64, command: Vec<String>) -> Result<Job> {
    let mut words = command.into_iter();
    let program = PathBuf::from(words.next().unwrap_or_default());
    let name = program.file_name().unwrap_or_default().to_string_lossy().into_owned();
    files.push(program);
    Ok(Job {
        program: format!("try/{name}"),
        args: words.collect(),
        files,
        limit: Duration::from_secs(limit),
    })
}
