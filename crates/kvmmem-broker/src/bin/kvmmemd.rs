// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmemd`: the broker as a daemon.
//!
//! Exit status: 0 after SIGTERM or SIGINT; 1 where it cannot serve; 2 where the command line is
//! wrong; 3 where another instance has the socket.
#![deny(unsafe_code)]

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    kvmmem_broker::run_daemon(kvmmem_broker::Options::parse())
}
