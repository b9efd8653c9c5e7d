// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the broker sends: answers, refusals and pushes.

use kvmmem_kvmi::token::Token;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::grant::{Cursor, GrantInfo, KvmiPolicy, NewGrant, RevokeReport};
use super::registers::{VcpuQuestion, VcpuRegisters};
use super::token_text;
use super::vm::{NewIntrospector, NewTarget, TargetInfo};
use crate::map::Region;
use crate::scope::Scope;

/// What the broker sends.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromBroker {
    /// A request succeeded.
    Answer {
        /// The request's id.
        id: u64,
        /// What it asked for.
        answer: Answer,
    },
    /// A request failed; id 0 where the packet could not be read, and the connection is then
    /// closed.
    Refused {
        /// The request's id.
        id: u64,
        /// Which kind of failure.
        refusal: Refusal,
        /// The failure in words.
        message: String,
    },
    /// Push: introduces a target. Its RAM's memfds come with it.
    Target {
        /// The number by which the broker names it on this connection.
        id: u64,
        /// Number of this introduction. A target whose files were lost is introduced again with a
        /// higher number. 0 from a broker that does not count them.
        #[serde(default)]
        introduction: u64,
        /// Its name.
        name: String,
        /// Its UUID.
        uuid: Uuid,
        /// Grows with each change of its RAM.
        generation: u64,
        /// Where its RAM is.
        regions: Vec<Region>,
    },
    /// Push: a known target's RAM was reset or is elsewhere now.
    Changed {
        /// Number of the target.
        target: u64,
        /// Higher than before.
        generation: u64,
        /// Where its RAM is.
        regions: Vec<Region>,
    },
    /// Push: a token whose only holder is this connection's VM.
    Granted {
        /// The token.
        #[serde(with = "token_text")]
        token: Token,
        /// Number of the grant.
        grant: u64,
        /// Number of the target.
        target: u64,
        /// What it allows.
        scope: Scope,
        /// How long the token lives, milliseconds.
        expires_in_ms: u64,
    },
    /// Push: a grant that this connection has used, or has a token of, was revoked. To be confirmed
    /// by [`super::Call::RevokedDone`] once nothing reaches the target's memory by it.
    Revoke {
        /// Number of the grant.
        grant: u64,
    },
    /// Push: a question about the vCPUs of the VM that this connection has registered, with
    /// [`super::Registration::vcpu_questions`]. To be answered by [`super::Call::VcpuAnswer`].
    AskVcpus {
        /// Number of the question, which the answer repeats.
        id: u64,
        /// The question.
        question: VcpuQuestion,
    },
    /// Push: the target is no longer there, and its tokens are void.
    Gone {
        /// Number of the target.
        target: u64,
    },
    /// Push: the request is being carried out, and takes longer than a client waits for an answer.
    Working,
}

/// The outcome of a request that succeeded.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// Nothing more to say.
    Done,
    /// The VM is registered.
    Registered {
        /// Its number.
        vm: u64,
        /// The generation of its RAM; 0 where it has none that others may look at.
        #[serde(default)]
        generation: u64,
    },
    /// The token was good, and is used up now.
    Redeemed {
        /// Number of the grant.
        grant: u64,
        /// Number of the target.
        target: u64,
        /// What the grant allows.
        scope: Scope,
    },
    /// The view is open.
    Attached {
        /// Its number.
        view: u64,
        /// Number of the grant.
        grant: u64,
        /// Number of the target.
        target: u64,
        /// What the view allows.
        scope: Scope,
    },
    /// The view is open, for a process of the host. The RAM's memfds come with it, opened read-only
    /// where the view is.
    HostAttached {
        /// Its number.
        view: u64,
        /// Number of the grant.
        grant: u64,
        /// Number of the target.
        target: u64,
        /// What the view allows.
        scope: Scope,
        /// UUID of the target.
        uuid: Uuid,
        /// Name of the target; empty where it is not known.
        #[serde(default)]
        name: String,
        /// Grows with each change of the target's RAM.
        generation: u64,
        /// Where the target's RAM is, all of it.
        regions: Vec<Region>,
        /// Whether it is private to the VMM: then no memfd comes, and memory is copied through
        /// channels ([`super::Call::OpenCopies`]).
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        copied: bool,
    },
    /// The channel for copies is open: this end of its socket comes with it.
    CopiesOpened,
    /// The grant is made.
    Granted(NewGrant),
    /// A page of grants.
    Grants {
        /// The grants, by ascending number. One with many views continues in the next page,
        /// with other views.
        grants: Vec<GrantInfo>,
        /// Where the next page starts, if there is one.
        next: Option<Cursor>,
    },
    /// The grant is revoked.
    Revoked(RevokeReport),
    /// What tokens allow that KVMI makes for a target.
    Policy {
        /// The policy in force.
        policy: KvmiPolicy,
    },
    /// The VM is attached and registered.
    Added(NewTarget),
    /// The VM is an introspector now.
    IntrospectorAdded(NewIntrospector),
    /// How many PCI slots an introspector has for views.
    FreeSlots {
        /// PCI slots that are free.
        free: u32,
        /// PCI slots that there are.
        count: u32,
        /// Buses whose slots are not used until the introspector is reset: a tool without the
        /// module did not acknowledge the end of its view.
        #[serde(default)]
        retired: Vec<String>,
    },
    /// A page of a target's vCPUs.
    Registers {
        /// Their registers, in the order of the vCPUs' numbers.
        vcpus: Vec<VcpuRegisters>,
        /// Whether there are more.
        more: bool,
    },
    /// The target's vCPUs are stopped.
    Paused {
        /// Whether they ran before this connection's first call, and run again after the pause.
        was_running: bool,
    },
    /// The token was pushed to this connection ([`FromBroker::Granted`], earlier in the stream):
    /// the peer has it.
    Pushed,
    /// A page of VMs.
    Targets {
        /// The VMs, by ascending id.
        targets: Vec<TargetInfo>,
        /// Whether there are more.
        more: bool,
    },
}

/// Why a request was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Refusal {
    /// The packet is not one of this protocol's.
    Malformed,
    /// An argument breaks a rule.
    Invalid,
    /// The name, the UUID, the context id or the hook exists already.
    Exists,
    /// There is no such target, hook or token.
    Unknown,
    /// This connection may not do that.
    Denied,
    /// A limit is reached.
    Limit,
    /// The peer does not read what the broker sends.
    Busy,
    /// It is not possible with this target: its RAM is private to its VMM and cannot be mapped, or
    /// its VMM cannot be asked.
    Unsupported,
}
