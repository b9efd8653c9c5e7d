// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program `kvmmem`.
#![deny(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    kvmmem_cli::main()
}
