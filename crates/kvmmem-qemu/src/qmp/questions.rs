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

/// A device that brings memory, as `query-memory-devices` lists it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct MemoryDevice {
    /// `dimm`, `nvdimm`, `virtio-mem` and others.
    #[serde(rename = "type")]
    pub kind: String,
    /// The rest of it.
    pub data: MemoryDeviceData,
}

/// What is said of a device that brings memory.
#[derive(Clone, Debug, Default, PartialEq, Eq, Deserialize)]
pub struct MemoryDeviceData {
    /// The path of its backend, where it has one.
    pub memdev: Option<String>,
}

impl Qmp {
    /// The memory backends.
    pub fn memory_backends(&mut self) -> Result<Vec<MemoryBackend>, QmpError> {
        self.ask("query-memdev", json!({}))
    }

    /// How much RAM there is.
    pub fn memory_size(&mut self) -> Result<MemorySize, QmpError> {
        self.ask("query-memory-size-summary", json!({}))
    }

    /// Number of vCPUs.
    pub fn vcpus(&mut self) -> Result<u32, QmpError> {
        let vcpus: Vec<Value> = self.ask("query-cpus-fast", json!({}))?;
        u32::try_from(vcpus.len()).map_err(|_| self.garbage("query-cpus-fast"))
    }

    /// The text of `info mtree -f`.
    pub fn memory_tree(&mut self) -> Result<String, QmpError> {
        self.ask("human-monitor-command", json!({ "command-line": "info mtree -f" }))
    }

    /// The devices that bring memory.
    pub fn memory_devices(&mut self) -> Result<Vec<MemoryDevice>, QmpError> {
        self.ask("query-memory-devices", json!({}))
    }

    /// Where the memory at a guest-physical address is in QEMU's own address space.
    pub fn host_address(&mut self, gpa: u64) -> Result<u64, QmpError> {
        const COMMAND: &str = "human-monitor-command";
        let line = format!("gpa2hva {gpa:#x}");
        let answer: String = self.ask(COMMAND, json!({ "command-line": line }))?;
        // "Host virtual address for 0x0 (pc.ram) is 0x7f427be00000"
        let hva = answer
            .trim_end()
            .rsplit_once(" is 0x")
            .and_then(|(_, hva)| u64::from_str_radix(hva, 16).ok());
        hva.ok_or_else(|| self.garbage(COMMAND))
    }
}
