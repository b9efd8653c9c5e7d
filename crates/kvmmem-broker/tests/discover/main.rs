// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMMs that lie, hang and end. They are copies of this program, under the name of one.

#[path = "../common/mod.rs"]
mod common;
mod fake;
mod memory;
mod next_broker;
mod process;
mod qmp;
