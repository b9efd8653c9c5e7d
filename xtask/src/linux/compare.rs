// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Compares the rows of a verb with what the guest's own /proc shows.
//!
//! The guest keeps still, but its kernel does not quite: workers of its queues come, go and are
//! renamed, and its threads wake up. What can change in that way is not compared.

mod kernel;
mod machine;
mod processes;
mod row;
mod sockets;
#[cfg(test)]
mod tests;

pub(super) use kernel::{kernel, log, modules};
pub(super) use machine::{changes, machine, untouched};
pub(super) use processes::{
    environments, files, long_command_line, process_ids, processes, threads,
};
pub(super) use row::{number, text};
pub(super) use sockets::sockets;
