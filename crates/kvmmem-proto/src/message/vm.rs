// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMs, as they are registered and listed.

use std::fmt;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::Region;
use crate::endpoint::Endpoint;

/// What a VMM says of its VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
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
    /// Whether others may look at this VM; its RAM's memfds then come with the request.
    pub introspectable: bool,
    /// Whether this VM may map the memory of others.
    pub introspector: bool,
    /// Whether the VMM answers [`super::FromBroker::AskVcpus`]. One that does not is never asked.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub vcpu_questions: bool,
    /// Where its RAM is; empty unless introspectable.
    pub regions: Vec<Region>,
}

/// A registered VM, as a list shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TargetInfo {
    /// Its number.
    pub id: u64,
    /// Its name.
    pub name: String,
    /// Its UUID.
    pub uuid: Uuid,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// When it was started, milliseconds since the epoch.
    pub start_time_ms: i64,
    /// Its vsock context id.
    pub cid: Option<u32>,
    /// Whether others may look at it.
    pub introspectable: bool,
    /// Whether it may map the memory of others.
    pub introspector: bool,
    /// RAM that others may look at, bytes.
    pub memory_bytes: u64,
    /// Process id of its VMM.
    pub pid: u32,
    /// Its hooks.
    pub hooks: Vec<HookInfo>,
}

/// What to do with an introspector under a stock QEMU whose guest does not let go of memory that
/// was taken back.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnSilence {
    /// Say so, and go on trying.
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
