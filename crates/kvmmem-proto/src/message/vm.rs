// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMs, as they are registered and listed.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::which::{Evidence, Which};
use crate::endpoint::Endpoint;
use crate::map::Region;

/// What identifies a VM, in registrations, lists and views.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmIdentity {
    /// Name, unique on the host: 1 to 63 bytes that a terminal shows, and not the text of a UUID.
    pub name: String,
    /// UUID, unique on the host.
    pub uuid: Uuid,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// When the VM was started, milliseconds since the epoch.
    pub start_time_ms: i64,
    /// Its vsock context id, where it has one.
    pub cid: Option<u32>,
    /// Whether others may look at this VM.
    pub introspectable: bool,
    /// Whether this VM may map the memory of others.
    pub introspector: bool,
}

/// What a VMM registers its VM with; the RAM's memfds come with it if the VM is introspectable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// The VM.
    #[serde(flatten)]
    pub identity: VmIdentity,
    /// Whether the VMM answers [`super::FromBroker::AskVcpus`]. One that does not is never asked.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vcpu_questions: bool,
    /// Where its RAM is; empty unless introspectable.
    pub regions: Vec<Region>,
}

impl VmIdentity {
    /// A VM with one vCPU that others may look at.
    pub fn target(name: impl Into<String>, uuid: Uuid) -> Self {
        Self {
            name: name.into(),
            uuid,
            vcpus: 1,
            start_time_ms: 0,
            cid: None,
            introspectable: true,
            introspector: false,
        }
    }

    /// This VM's registration; `regions` is empty unless it is introspectable.
    pub fn registered(self, regions: Vec<Region>) -> Registration {
        Registration { identity: self, vcpu_questions: false, regions }
    }
}

/// A registered VM, as a list shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetInfo {
    /// Its number.
    pub id: u64,
    /// The VM.
    #[serde(flatten)]
    pub identity: VmIdentity,
    /// RAM that others may look at, bytes.
    pub memory_bytes: u64,
    /// Process id of its VMM.
    pub pid: u32,
    /// Its hooks.
    pub hooks: Vec<HookInfo>,
}

/// A VM that was attached as it ran.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NewTarget {
    /// The VM.
    pub target: TargetInfo,
    /// Where its RAM is.
    pub regions: Vec<Region>,
    /// How that became known.
    pub evidence: Evidence,
    /// Where its memory can only be copied: why, and what helps.
    pub copied: Option<String>,
}

/// A VM under a stock QEMU that is to be an introspector.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IntrospectorRequest {
    /// Which VM.
    pub which: Which,
    /// Its vsock context id, where QEMU does not say.
    pub cid: Option<u32>,
    /// What to call it; otherwise as QEMU does.
    pub name: Option<String>,
    /// What to do where its guest does not release memory.
    pub on_silence: OnSilence,
    /// Whether it is trusted as a whole: its tools may do without the module.
    #[serde(default)]
    pub trusted: bool,
}

/// An introspector that was added.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NewIntrospector {
    /// The VM.
    pub target: TargetInfo,
    /// How many PCI slots there are for views.
    pub slot_count: u32,
    /// Whether this QEMU shows parts of files (`offset` of its memory backends): where it does
    /// not, a view shows all of a target's RAM or nothing.
    pub has_offset: bool,
}

/// What to do with an introspector under a stock QEMU whose guest does not release memory of a
/// revoked grant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnSilence {
    /// Report it, and keep trying.
    #[default]
    Report,
    /// Stop its vCPUs, too.
    Pause,
    /// End its QEMU, too.
    Kill,
}

impl fmt::Display for OnSilence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Report => "report",
            Self::Pause => "pause",
            Self::Kill => "kill",
        })
    }
}

/// A hook, as a list shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookInfo {
    /// Where the tool listens.
    pub endpoint: Endpoint,
    /// Whether a tool is connected now.
    pub connected: bool,
}
