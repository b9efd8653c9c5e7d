// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem`, the command line: a library for its program and for `packaging/manual`, which makes
//! the manual pages. On the host: runs virtual machines, asks the broker, reads and dumps
//! targets. In an introspector: reads and maps targets. On both: `doctor`.
#![deny(unsafe_code)]

mod address_space;
mod attach;
mod broker;
mod check;
mod connect;
mod dmesg;
mod doctor;
#[cfg(test)]
mod documented;
mod dump;
mod embedded;
mod escape;
mod failure;
mod files;
mod grant;
mod hexdump;
mod hook;
mod host;
mod info;
mod input;
mod interrupt;
mod introspector;
mod linux;
mod log;
mod map;
mod maps;
mod memory;
mod modules;
mod mounts;
mod number;
mod output;
mod page_tables;
mod parallel;
mod physical;
mod policy;
mod process;
mod progress;
mod proxy;
mod ps;
mod qemu_args;
mod range;
mod registered;
mod scan;
mod shell;
mod sockets;
mod source;
mod strings;
mod suggestion;
mod table;
mod target;
mod target_name;
mod target_run;
mod text_file;
mod time;
mod token_file;
mod translate;
mod unreadable;
mod vcpu;
mod vm;
mod watch;

use std::process::ExitCode;

use clap::{Command, CommandFactory, FromArgMatches, Parser, Subcommand};

use crate::output::Output;

/// Look at one virtual machine's memory from another one, on a stock KVM host.
#[derive(Parser)]
#[command(name = "kvmmem", version, propagate_version = true, after_help = EXIT_CODES)]
struct Cli {
    /// Print one JSON object a line instead of text; on standard error too: errors have the key
    /// `error`, log and audit lines the key `level`.
    #[arg(long, global = true)]
    json: bool,

    #[command(subcommand)]
    verb: Verb,
}

const EXIT_CODES: &str = "\
Addresses, lengths and sizes are decimal, or hexadecimal after 0x, with or without a unit: 4096, 0x1000, 4K, 4KiB (K, M,
G and T are powers of 1024). Ranges are START..END, START.. or ..END; END is not part of the range. Times have a unit:
500ms, 60s, 5m, 2h, 30d. With --json, addresses, table entries and words of memory are strings, \"0x1000\", as JSON's numbers
are exact up to 2^53 only; lengths, counts and times are numbers.

Exit codes:
  0  done; doctor: the machine can be used
  1  failed, standard error says why; doctor: it cannot be used; scan: nothing was found
  2  the command line is wrong; scan: failed
  3  check: something was found; dmesg, files, info, maps, modules, mounts, ps, scan, sockets, strings: some of it could not
     be read
  4  the verbs about a Linux guest, and others with --pid: it was restarted while it was read
attach, dump, grant revoke, translate and vm have further ones: see their --help. Where the reader of a pipe ends first, as
head does, the command ends by SIGPIPE (141 in a shell).

Environment:
  KVMMEM_KVMI_PORT  vsock port to listen on, unless --listen says where
  KVMMEM_DEVICE     device to map through, unless --device says which
  KVMMEM_GUEST_PORT vsock port of the host's broker, where this machine runs under a stock QEMU [default: 27510]
  KVMMEM_BROKER     socket of the broker, unless --broker says which
  KVMMEM_TOKEN      token to attach by, unless --token, --token-file or --listen say how
  RUST_LOG          what to log, for example `debug`; `warn` if unset";

#[derive(Subcommand)]
enum Verb {
    /// Run a virtual machine.
    Vm(Box<vm::Arguments>),
    /// Find the virtual machines of this host.
    Host(host::Host),
    /// List targets; add running virtual machines as targets, or remove them.
    Target(target::Target),
    /// List introspectors; add running virtual machines under a stock QEMU, or remove them.
    Introspector(introspector::Introspector),
    /// In an introspector without the module: attach views for tools that are not root.
    Proxy(proxy::Arguments),
    /// Print what a stock QEMU, or libvirt, needs to run an introspector.
    QemuArgs(qemu_args::Arguments),
    /// Connect targets to tools that listen for them over KVMI.
    Hook(hook::Hook),
    /// Say what this machine can be used for, and what to do where it cannot.
    Doctor(doctor::Arguments),
    /// Grant access to a target's memory, list the grants, or revoke one.
    Grant(grant::Grant),
    /// Show or set the access policy for tokens issued over KVMI.
    Policy(policy::Policy),
    /// Attach a view, and print its ranges and its events.
    Attach(attach::Arguments),
    /// List the processes of a Linux guest.
    Ps(ps::Arguments),
    /// List the files that processes of a Linux guest have open.
    Files(files::Arguments),
    /// List the sockets of a Linux guest, and the processes that hold them.
    Sockets(sockets::Arguments),
    /// Look for signs that a Linux guest's kernel was tampered with.
    Check(check::Arguments),
    /// List the memory mappings of processes of a Linux guest.
    Maps(maps::Arguments),
    /// List the mounts that a process of a Linux guest sees.
    Mounts(mounts::Arguments),
    /// Print the kernel log of a Linux guest.
    Dmesg(dmesg::Arguments),
    /// List the modules of a Linux guest's kernel.
    Modules(modules::Arguments),
    /// Say which kernel a Linux guest runs.
    Info(info::Arguments),
    /// Write a target's memory to a file.
    Dump(dump::Arguments),
    /// Find bytes in a target's memory.
    Scan(scan::Arguments),
    /// Print the text in a target's memory.
    Strings(strings::Arguments),
    /// Show how a target's memory changes.
    Watch(watch::Arguments),
    /// Look up a target's virtual addresses in its page tables.
    Translate(translate::Arguments),
    /// Read a target's memory, over KVMI or by a view.
    Read(physical::Read),
    /// Write to a target's memory, over KVMI or by a view.
    Write(physical::Write),
    /// In an introspector: map a page of a target and print it.
    Map(map::Arguments),
}

/// What [`EXIT_CODES`] says, for a command that has no others.
const USUAL_EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed, standard error says why
  2  the command line is wrong";

/// The definition of the command line: each command states its exit codes.
pub fn command() -> Command {
    Cli::command().mut_subcommands(with_exit_codes)
}

fn with_exit_codes(command: Command) -> Command {
    if command.has_subcommands() {
        return command.mut_subcommands(with_exit_codes);
    }
    let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
    if help.contains("Exit codes:") {
        return command;
    }
    let gap = if help.is_empty() { "" } else { "\n\n" };
    command.after_help(format!("{help}{gap}{USUAL_EXIT_CODES}"))
}

fn parse() -> Result<Cli, clap::Error> {
    let mut matches = command().try_get_matches()?;
    Cli::from_arg_matches_mut(&mut matches).map_err(|error| error.format(&mut command()))
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        Err(mut error) => {
            suggestion::add(
                &mut error,
                std::env::args_os().skip(1).map(|word| word.to_string_lossy().into_owned()),
                &command(),
            );
            return failure::report_clap(&error, wants_json());
        }
    };
    log::start(cli.json);

    let failed = if matches!(cli.verb, Verb::Scan(_)) { scan::FAILED } else { 1 };
    let mut output = Output::new(cli.json);
    let result = match cli.verb {
        Verb::Vm(arguments) => arguments.run(&mut output),
        Verb::Host(arguments) => arguments.run(&mut output),
        Verb::Target(arguments) => arguments.run(&mut output),
        Verb::Introspector(arguments) => arguments.run(&mut output),
        Verb::Proxy(arguments) => arguments.run(&mut output),
        Verb::QemuArgs(arguments) => arguments.run(&mut output),
        Verb::Hook(arguments) => arguments.run(&mut output),
        Verb::Doctor(arguments) => arguments.run(&mut output),
        Verb::Grant(arguments) => arguments.run(&mut output),
        Verb::Policy(arguments) => arguments.run(&mut output),
        Verb::Attach(arguments) => arguments.run(&mut output),
        Verb::Ps(arguments) => arguments.run(&mut output),
        Verb::Files(arguments) => arguments.run(&mut output),
        Verb::Sockets(arguments) => arguments.run(&mut output),
        Verb::Check(arguments) => arguments.run(&mut output),
        Verb::Maps(arguments) => arguments.run(&mut output),
        Verb::Mounts(arguments) => arguments.run(&mut output),
        Verb::Dmesg(arguments) => arguments.run(&mut output),
        Verb::Modules(arguments) => arguments.run(&mut output),
        Verb::Info(arguments) => arguments.run(&mut output),
        Verb::Dump(arguments) => arguments.run(&mut output),
        Verb::Scan(arguments) => arguments.run(&mut output),
        Verb::Strings(arguments) => arguments.run(&mut output),
        Verb::Watch(arguments) => arguments.run(&mut output),
        Verb::Translate(arguments) => arguments.run(&mut output),
        Verb::Read(arguments) => arguments.run(&mut output),
        Verb::Write(arguments) => arguments.run(&mut output),
        Verb::Map(arguments) => arguments.run(&mut output),
    };
    embedded::finish();
    result.unwrap_or_else(|error| failure::end(&error, cli.json, failed))
}

/// Whether a command line that cannot be parsed asks for JSON.
fn wants_json() -> bool {
    std::env::args_os()
        .skip(1)
        .take_while(|argument| argument != "--")
        .any(|argument| argument == "--json")
}
