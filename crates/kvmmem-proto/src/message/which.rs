// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which VM an operator names, and how the broker learned the layout of its RAM.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Which VM to attach.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Which {
    /// The one that a process runs.
    Pid(u32),
    /// The one that a QEMU with a QMP socket runs.
    Qmp {
        /// The socket; absolute.
        socket: PathBuf,
        /// The process, where it is not the one that listens.
        pid: Option<u32>,
    },
    /// One of libvirt's, by its name.
    Libvirt(String),
}

/// How the layout became known.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Evidence {
    /// QEMU said it.
    Qmp,
    /// By the rules of the machine type, and the ACPI tables in the guest's memory confirm it.
    RulesAndAcpi,
    /// By the rules of the VMM, and the memory map that the guest was started with confirms it.
    RulesAndBootMap,
}
