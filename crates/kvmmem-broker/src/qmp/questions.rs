// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is asked of a QEMU whose RAM is to be found.

use serde::Deserialize;
use serde_json::{Value, json};

use super::{Qmp, QmpError};

/// A memory backend, as `query-memdev` lists it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct MemoryBackend {
    /// Its id; some have none.
    pub id: Option<String>,
    /// Bytes.
    pub size: u64,
    /// Whether others can see its memory; QEMU before 6.1 does not say.
    pub share: Option<bool>,
}

/// How much RAM there is, as `query-memory-size-summary` says, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemorySize {
    /// From the start.
    pub base_memory: u64,
    /// In devices that can be unplugged.
    #[serde(default)]
    pub plugged_memory: u64,
}

impl Qmp {
    /// The memory backends.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn memory_backends(&mut self) -> Result<Vec<MemoryBackend>, QmpError> {
        self.ask("query-memdev", json!({}))
    }

    /// How much RAM there is.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn memory_size(&mut self) -> Result<MemorySize, QmpError> {
        self.ask("query-memory-size-summary", json!({}))
    }

    /// Number of vCPUs.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn vcpus(&mut self) -> Result<u32, QmpError> {
        let vcpus: Vec<Value> = self.ask("query-cpus-fast", json!({}))?;
        u32::try_from(vcpus.len()).map_err(|_| self.garbage("query-cpus-fast"))
    }

    /// The text of `info mtree -f`.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn memory_tree(&mut self) -> Result<String, QmpError> {
        self.ask("human-monitor-command", json!({ "command-line": "info mtree -f" }))
    }
}
