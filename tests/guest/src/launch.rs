// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem-guest launch JSON`: takes on a [`Command`]'s user, groups and limits, then becomes its
//! program.
//!
//! A program of its own, because the standard library cannot set supplementary groups in a child.

use std::os::unix::process::CommandExt;
use std::{io, process};

use rustix::process::{Gid, Resource, Rlimit, Uid, setrlimit};

use crate::request::Command;

/// The subcommand's name.
pub const VERB: &str = "launch";

/// The program that launches `command`: this one again, in a new session so that the whole of it
/// can be killed.
///
/// # Errors
/// When `command` cannot be written as JSON or names no program.
pub fn launcher(command: &Command) -> io::Result<process::Command> {
    if command.argv.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "no program given"));
    }
    let mut launcher = process::Command::new("/proc/self/exe");
    launcher.arg(VERB).arg(serde_json::to_string(command)?);
    Ok(launcher)
}

/// Becomes the program described by `json`; returns only if that failed.
#[must_use]
pub fn become_program(json: &str) -> io::Error {
    let command: Command = match serde_json::from_str(json) {
        Ok(command) => command,
        Err(error) => return error.into(),
    };
    if let Err(error) = take_on(&command) {
        return error;
    }
    let Some((program, args)) = command.argv.split_first() else {
        return io::Error::new(io::ErrorKind::InvalidInput, "no program given");
    };
    let home = if command.uid == 0 { "/root" } else { "/home" };
    process::Command::new(program)
        .args(args)
        .env_clear()
        .env("PATH", "/bin:/sbin:/usr/bin:/usr/sbin")
        .env("HOME", home)
        .env("TMPDIR", "/tmp")
        .envs(&command.env)
        .current_dir(command.cwd.as_deref().unwrap_or("/"))
        .exec()
}

fn take_on(command: &Command) -> io::Result<()> {
    rustix::process::setsid()?;
    if let Some(bytes) = command.memlock {
        setrlimit(Resource::Memlock, Rlimit { current: Some(bytes), maximum: Some(bytes) })?;
    }
    let groups: Vec<_> = command.groups.iter().map(|&group| Gid::from_raw(group)).collect();
    // This process has one thread, so the thread's identity is the process's.
    rustix::thread::set_thread_groups(&groups)?;
    let (uid, gid) = (Uid::from_raw(command.uid), Gid::from_raw(command.gid));
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    rustix::thread::set_thread_res_uid(uid, uid, uid)?;
    Ok(())
}
