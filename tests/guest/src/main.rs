// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Process 1 and agent of a test VM; see the library.

#![deny(unsafe_code)]

use std::io;
use std::os::fd::AsFd as _;
use std::process::ExitCode;

use kvmmem_guest::channel::Channel;
use kvmmem_guest::{init, launch, report, serve};

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = args.iter().map(String::as_str).collect();
    let result = match words.as_slice() {
        // The kernel may add arguments of its own to process 1.
        _ if std::process::id() == 1 => init::run(),
        ["agent"] => serve::serve(),
        // As inetd's services do: the tests' way in.
        ["connection"] => io::stdin()
            .as_fd()
            .try_clone_to_owned()
            .and_then(|socket| serve::connection(Channel::new(socket))),
        ["host"] => report::run_host(),
        [verb, json] if *verb == launch::VERB => {
            eprintln!("cannot run: {}", launch::become_program(json));
            return ExitCode::from(127);
        }
        _ => {
            eprintln!(
                "kvmmem-guest is process 1 of the test bed's virtual machines; run `cargo xtask` instead"
            );
            return ExitCode::from(2);
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvmmem-guest: {error}");
            ExitCode::FAILURE
        }
    }
}
