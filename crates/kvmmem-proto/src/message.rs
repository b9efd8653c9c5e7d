// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What travels between the broker and its peers, VMMs and the command line: one JSON object per
//! packet.
//!
//! A peer sends [`Request`]s; each carries an id of the peer's choice, which the answer repeats.
//! The broker also *pushes*: [`FromBroker::Target`] always precedes the first use of that target's
//! id on a connection. File descriptors travel beside their packet: the RAM's memfds, in the order
//! of [`Region::file`], with [`Call::Register`] of an introspectable VM, with
//! [`FromBroker::Target`] and with [`Answer::HostAttached`], one with [`Call::OpenCopies`] and one
//! with its answer, none with all else.
//!
//! The enums are tagged from outside, as in `{"id":1,"call":{"redeem":{"token":"..."}}}`: other
//! forms make the parser keep copies of the text, and with it of tokens, that are not wiped.

mod answer;
mod grant;
mod registers;
pub(crate) mod token_text;
mod vm;
mod which;

use kvmmem_kvmi::token::Token;
use serde::{Deserialize, Serialize};

use crate::endpoint::Endpoint;
pub use crate::map::Region;
use crate::scope::Span;
pub use answer::{Answer, FromBroker, Refusal};
pub use grant::{
    Caller, Cursor, GrantInfo, GrantRequest, GrantState, KvmiPolicy, NewGrant, Origin,
    RevokeReport, ViewCounters, ViewInfo,
};
pub use registers::{SegmentRegister, VcpuAnswer, VcpuQuestion, VcpuRegisters};
pub use vm::{
    HookInfo, IntrospectorRequest, NewIntrospector, NewTarget, OnSilence, Registration, TargetInfo,
    VmIdentity,
};
pub use which::{Evidence, Which};

/// The largest packet, bytes.
pub const MAX_PACKET: usize = 64 * 1024;

/// A request and its id.
#[derive(Debug, Serialize, Deserialize)]
pub struct Request {
    /// Repeated by the answer.
    pub id: u64,
    /// What is asked for.
    pub call: Call,
}

/// What a peer asks for.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Call {
    /// Registers a VM; it stays as long as this connection. Answer: [`Answer::Registered`].
    Register(Registration),
    /// Trades a token for a target. Answer: [`Answer::Redeemed`] or [`Answer::Pushed`].
    Redeem {
        /// The token.
        #[serde(with = "token_text")]
        token: Token,
    },
    /// Reports the use of a pushed token. Valid until the peer has confirmed the revocation of its
    /// grant. One way: never answered.
    Used {
        /// Number of its grant.
        grant: u64,
    },
    /// Uses a token to open a view. Answer: [`Answer::Attached`] for a VMM,
    /// [`Answer::HostAttached`] for others.
    Attach {
        /// The token.
        #[serde(with = "token_text")]
        token: Token,
        /// The process that asked.
        caller: Caller,
        /// Whether to open the view read-only, even if the grant allows writes.
        read_only: bool,
        /// Addresses that the process wants to reach, at most
        /// [`MAX_SPANS`](crate::scope::MAX_SPANS), in any order. Where the view would have
        /// no memory at one of them the call is refused and takes no use of the token. A broker
        /// that does not know this field ignores it.
        #[serde(default, skip_serializing_if = "Vec::is_empty")]
        reaching: Vec<Span>,
    },
    /// Opens a channel for copies from a view of this connection's, where the target's RAM is
    /// private. A memfd comes with it, which the channel's bytes go through; what then travels
    /// is in [`crate::copy`]. Answer: [`Answer::CopiesOpened`].
    OpenCopies {
        /// Number of the view.
        view: u64,
    },
    /// Reports that a view of this connection was closed. One way: never answered.
    Detached {
        /// Its number.
        view: u64,
        /// Its last counters.
        counters: ViewCounters,
    },
    /// Reports that the files of a target did not arrive, so that what was opened cannot be used:
    /// it is closed, and an operator's token gets the use back. The files come again with what is
    /// opened next. One way: never answered.
    Unreceived {
        /// Number of the target.
        target: u64,
        /// Which of its introductions did not arrive: a later one is not undone. 0 where the files
        /// go with [`Answer::HostAttached`].
        introduction: u64,
        /// What cannot be used.
        unusable: Unusable,
    },
    /// Reports the counters of a view of this connection. One way: never answered.
    Counters {
        /// Its number.
        view: u64,
        /// The counters.
        counters: ViewCounters,
    },
    /// Reports that nothing of this connection reaches memory by a revoked grant any more. One way:
    /// never answered.
    RevokedDone {
        /// Number of the grant.
        grant: u64,
    },
    /// Reports that this connection's VM was reset or has other RAM now, in the same memfds. One
    /// way: never answered.
    RamChanged {
        /// Where its RAM is now.
        regions: Vec<Region>,
        /// What happened.
        change: Change,
    },
    /// Reports that this connection's VM, whose RAM has not changed since, had this generation when
    /// it was registered with an earlier broker ([`Answer::Registered`], and one more for each
    /// [`Call::RamChanged`]). Only the first call after [`Call::Register`] may be this one,
    /// with a lower generation than the answer's. One way: never answered.
    Continued {
        /// The generation.
        generation: u64,
    },
    /// Answers [`FromBroker::AskVcpus`]. One way: never answered.
    VcpuAnswer {
        /// The question's id.
        id: u64,
        /// The answer.
        answer: VcpuAnswer,
    },
    /// Makes a token. Answer: [`Answer::Granted`].
    Grant(GrantRequest),
    /// Lists the grants from a cursor on. Answer: [`Answer::Grants`].
    Grants {
        /// [`Answer::Grants::next`] of the page before; the default for the first page.
        after: Cursor,
    },
    /// Revokes a grant, and waits until all peers that use it have confirmed. Answer:
    /// [`Answer::Revoked`].
    Revoke {
        /// Number of the grant.
        grant: u64,
    },
    /// Returns or sets what tokens allow that KVMI makes for a target. Answer: [`Answer::Policy`].
    Policy {
        /// Name or UUID of the target; by its UUID it need not be registered.
        target: String,
        /// The new policy, to set one.
        set: Option<KvmiPolicy>,
    },
    /// Lists the VMs whose id is above `after`. Answer: [`Answer::Targets`].
    Targets {
        /// The last id of the page before; 0 for the first page.
        after: u64,
    },
    /// Attaches a VM that runs under a stock VMM, and registers it; for root alone. Answer:
    /// [`Answer::Added`].
    AddTarget {
        /// Which VM.
        which: Which,
        /// What to call it; otherwise as its VMM does.
        name: Option<String>,
    },
    /// Removes a VM that was added; for root alone. Answer: [`Answer::Done`].
    RemoveTarget {
        /// Name or UUID of the target.
        target: String,
    },
    /// Makes an introspector of a VM that runs under a stock QEMU: its views are PCI devices. For
    /// root alone. Answer: [`Answer::IntrospectorAdded`].
    AddIntrospector(IntrospectorRequest),
    /// Removes an introspector that was added, with its views; for root alone. Answer:
    /// [`Answer::Done`].
    RemoveIntrospector {
        /// Its name or UUID.
        name: String,
    },
    /// Asks how many views an introspector that was added has slots for. Answer:
    /// [`Answer::FreeSlots`].
    FreeSlots {
        /// Its name or UUID.
        introspector: String,
    },
    /// Asks for the registers of a target's vCPUs. Answer: [`Answer::Registers`].
    Registers {
        /// Name or UUID of the target.
        target: String,
        /// How many vCPUs the pages before had.
        first: u32,
    },
    /// Stops a target's vCPUs. They run again with [`Call::Resume`], when this connection ends, and
    /// after 10 s in which it sent nothing: the call is to be repeated until then. A target
    /// that did not run stays as it is. Answer: [`Answer::Paused`].
    Pause {
        /// Name or UUID of the target.
        target: String,
    },
    /// Ends this connection's pause. Answer: [`Answer::Done`].
    Resume {
        /// Name or UUID of the target.
        target: String,
    },
    /// Connects a target to a tool that listens for KVMI, and again whenever that connection ends.
    /// Answer: [`Answer::Done`].
    Hook {
        /// Name or UUID of the target.
        target: String,
        /// Where the tool listens.
        endpoint: Endpoint,
    },
    /// Undoes a hook and closes its connection. Answer: [`Answer::Done`].
    Unhook {
        /// Name or UUID of the target.
        target: String,
        /// The hook's endpoint.
        endpoint: Endpoint,
    },
}

impl Call {
    /// Whether the call is never answered.
    pub fn is_one_way(&self) -> bool {
        matches!(
            self,
            Self::Used { .. }
                | Self::Detached { .. }
                | Self::Unreceived { .. }
                | Self::Counters { .. }
                | Self::RevokedDone { .. }
                | Self::RamChanged { .. }
                | Self::Continued { .. }
                | Self::VcpuAnswer { .. }
        )
    }
}

/// What a peer cannot use for want of a target's files.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Unusable {
    /// A view, by its number.
    View(u64),
    /// A grant's token, by the grant's number: pushed, or traded for a page.
    Token(u64),
}

/// What happened to a target's RAM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// The VM was reset: its RAM is where it was, with nothing of its content.
    Reset,
    /// RAM was added or removed.
    Resized,
}

#[cfg(test)]
mod tests;
