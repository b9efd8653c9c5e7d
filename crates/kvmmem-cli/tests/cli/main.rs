// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line as a user meets it: what it prints, where, and with which exit code.

mod dump_file;
mod kvmi;
mod machine;
mod pipe;
mod usage;

use std::process::{Command, Output, Stdio};

/// The command, apart from this process's environment and terminal.
fn kvmmem(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmem"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for variable in [
        "KVMMEM_KVMI_PORT",
        "KVMMEM_DEVICE",
        "RUST_LOG",
        "KVMMEM_BROKER",
        "KVMMEM_TOKEN",
        "CLICOLOR_FORCE",
    ] {
        command.env_remove(variable);
    }
    command
}

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    texts(kvmmem(arguments).output().unwrap())
}

fn texts(output: Output) -> (Option<i32>, String, String) {
    (
        output.status.code(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}
