// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Init and agent of the test bed's virtual machines, and the host's side of both.
//!
//! The binary `kvmmem-guest` is process 1 of every VM of the test bed; its role is on the kernel's
//! command line (`kvmmem.role=agent` or `kvmmem.role=host`). As an agent it serves commands over
//! vsock ([`Agent`] is the client); as a host it runs one program and reports it over a virtio port
//! ([`report`] reads that).

#![deny(unsafe_code)]

pub mod agent;
pub mod channel;
pub mod frame;
pub mod init;
pub mod launch;
pub mod process;
pub mod report;
pub mod request;
pub mod serve;

pub use agent::{Agent, AgentError, Child, Output};
pub use request::{Command, ExitStatus};

/// The vsock port that the agent listens on.
pub const AGENT_PORT: u32 = 1024;

/// Group of `/dev/kvmmem` inside the test VMs, which have no group database.
pub const KVMMEM_GID: u32 = 990;

/// User and group id of the normal user inside the test VMs.
pub const USER_ID: u32 = 1000;
