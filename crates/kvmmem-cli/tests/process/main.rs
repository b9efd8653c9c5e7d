// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Verbs about one process of a Linux guest, in a target's memory and in a dump file, whose kernel
//! and process a builder wrote.

#[path = "../../../kvmmem-linux/tests/common/mod.rs"]
mod builder;
#[path = "../common/mod.rs"]
mod common;
mod damage;
mod failure;
mod guest;
mod restart;
