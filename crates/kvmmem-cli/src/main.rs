// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem`, the command line: runs virtual machines and asks the broker on the host, reads and maps a target's memory
//! in an introspector, and says on either what is missing.
#![deny(unsafe_code)]

mod broker;
mod connect;
mod doctor;
mod failure;
mod hexdump;
mod map;
mod number;
mod output;
mod physical;
mod vm;

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tracing_subscriber::EnvFilter;

use crate::output::Output;

/// Look at one virtual machine's memory from another one, on a stock KVM host.
#[derive(Parser)]
#[command(name = "kvmmem", version, propagate_version = true, after_help = EXIT_CODES)]
struct Cli {
    /// Print one JSON object a line instead of text; errors too, on standard error.
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    verb: Verb,
}

const EXIT_CODES: &str = "\
Numbers are decimal, or hexadecimal after 0x.

Exit codes:
  0  done; doctor: usable; vm: see kvmmem vm --help
  1  failed, standard error says why; doctor: not usable
  2  the command line is wrong

Environment:
  KVMMEM_KVMI_PORT  vsock port to listen on, unless --listen says where
  KVMMEM_DEVICE     device to map through, unless --device says which
  KVMMEM_BROKER     socket of the broker, unless --broker says which
  RUST_LOG        what to log, for example `debug`; `warn` if unset";

#[derive(Subcommand)]
enum Verb {
    /// Run a virtual machine.
    Vm(Box<vm::Arguments>),
    /// List the virtual machines that the broker knows.
    Targets(broker::Targets),
    /// Connect a target to a tool that listens for it, now and whenever the connection ends.
    Hook(broker::Hook),
    /// Undo a hook.
    Unhook(broker::Hook),
    /// Say whether this machine can run kvmmem, and what to do if not.
    Doctor(doctor::Arguments),
    /// In an introspector: read a target's memory over KVMI.
    Read(physical::Read),
    /// In an introspector: write to a target's memory over KVMI.
    Write(physical::Write),
    /// In an introspector: map a page of a target and print it.
    Map(map::Arguments),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let filter = EnvFilter::try_from_env("RUST_LOG").unwrap_or_else(|_| EnvFilter::new("warn"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();

    let mut output = Output::new(cli.json);
    let result = match cli.verb {
        Verb::Vm(arguments) => arguments.run(&mut output),
        Verb::Targets(arguments) => arguments.run(&mut output),
        Verb::Hook(arguments) => arguments.hook(&mut output),
        Verb::Unhook(arguments) => arguments.unhook(&mut output),
        Verb::Doctor(arguments) => arguments.run(&mut output),
        Verb::Read(arguments) => arguments.run(&mut output),
        Verb::Write(arguments) => arguments.run(&mut output),
        Verb::Map(arguments) => arguments.run(&mut output),
    };
    result.unwrap_or_else(|error| failure::report(&error, cli.json))
}
