// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What travels between the broker and its peers, VMMs and the command line: one JSON object per packet.
//!
//! A peer sends [`Request`]s; each carries an id of the peer's choice, which the answer repeats. The broker also
//! *pushes*: [`FromBroker::Target`] always precedes the first use of that target's id on a connection. File
//! descriptors travel beside their packet, at most one: the RAM's memfd with [`Call::Register`] of an introspectable
//! VM, with [`FromBroker::Target`] and with [`Answer::HostAttached`], none with all else.
//!
//! The enums are tagged from outside, as in `{"id":1,"call":{"redeem":{"token":"..."}}}`: other forms make the parser
//! keep copies of the text, and with it of tokens, that nobody wipes.

mod grant;
mod token_text;

use std::fmt;

use kvmmem_kvmi::token::Token;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use crate::discover::attach::{Evidence, Which};
use crate::endpoint::Endpoint;
pub use crate::map::Region;
use crate::scope::Scope;
pub use grant::{
    Caller, Cursor, GrantInfo, GrantRequest, GrantState, KvmiPolicy, Origin, Revoked, ViewCounters, ViewInfo,
};

/// The largest packet, bytes.
pub const MAX_PACKET: usize = 64 * 1024;

/// What a VMM says of its VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    /// Name, unique on the host: 1 to 63 bytes, no control characters.
    pub name: String,
    /// UUID, unique on the host.
    pub uuid: Uuid,
    /// Number of vCPUs.
    pub vcpus: u32,
    /// When the VM was started, milliseconds since the epoch.
    pub start_time_ms: i64,
    /// Its vsock context id, where it has one.
    pub cid: Option<u32>,
    /// Whether others may look at this VM; its RAM's memfd then comes with the request.
    pub introspectable: bool,
    /// Whether this VM may map the memory of others.
    pub introspector: bool,
    /// Where its RAM is; empty unless introspectable.
    pub regions: Vec<Region>,
}

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
    /// Tells that a pushed token has been used. One way: never answered.
    Used {
        /// The token.
        #[serde(with = "token_text")]
        token: Token,
    },
    /// Uses a token to open a view. Answer: [`Answer::Attached`] for a VMM, [`Answer::HostAttached`] for others.
    Attach {
        /// The token.
        #[serde(with = "token_text")]
        token: Token,
        /// The process that asked.
        caller: Caller,
        /// Whether to open the view read-only, whatever the grant allows.
        read_only: bool,
    },
    /// Tells that a view of this connection was closed. One way: never answered.
    Detached {
        /// Its number.
        view: u64,
        /// Its last counters.
        counters: ViewCounters,
    },
    /// Tells the counters of a view of this connection. One way: never answered.
    Counters {
        /// Its number.
        view: u64,
        /// The counters.
        counters: ViewCounters,
    },
    /// Tells that nothing of this connection reaches memory by a revoked grant any more. One way: never answered.
    RevokedDone {
        /// Number of the grant.
        grant: u64,
    },
    /// Tells that this connection's VM was reset or has other RAM now, in the same memfd. One way: never answered.
    RamChanged {
        /// Where its RAM is now.
        regions: Vec<Region>,
        /// What happened.
        change: Change,
    },
    /// Makes a token. Answer: [`Answer::Granted`].
    Grant(GrantRequest),
    /// Lists the grants from a cursor on. Answer: [`Answer::Grants`].
    Grants {
        /// [`Answer::Grants::next`] of the page before; the default for the first page.
        after: Cursor,
    },
    /// Takes a grant back, and waits until everybody who uses it has confirmed. Answer: [`Answer::Revoked`].
    Revoke {
        /// Number of the grant.
        grant: u64,
    },
    /// Tells, and sets, what tokens allow that KVMI makes for a target. Answer: [`Answer::Policy`].
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
    /// Attaches a VM that runs under a stock VMM, and registers it; for root alone. Answer: [`Answer::Added`].
    AddTarget {
        /// Which VM.
        which: Which,
        /// What to call it; otherwise as its VMM does.
        name: Option<String>,
    },
    /// Takes a VM out that was added; for root alone. Answer: [`Answer::Done`].
    RemoveTarget {
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
                | Self::Counters { .. }
                | Self::RevokedDone { .. }
                | Self::RamChanged { .. }
        )
    }
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
    /// A request failed; id 0 where the packet could not be read, and the connection is then closed.
    Refused {
        /// The request's id.
        id: u64,
        /// Which kind of failure.
        refusal: Refusal,
        /// The failure in words.
        message: String,
    },
    /// Push: introduces a target. Its RAM's memfd comes with it.
    Target {
        /// The number by which the broker names it on this connection.
        id: u64,
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
    /// Push: a token of which this connection's VM is the only holder.
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
    /// Push: a grant that this connection has used, or has a token of, was taken back. To be confirmed by
    /// [`Call::RevokedDone`] once nothing reaches the target's memory by it.
    Revoke {
        /// Number of the grant.
        grant: u64,
    },
    /// Push: the target is no longer there, and its tokens are void.
    Gone {
        /// Number of the target.
        target: u64,
    },
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
    /// The view is open, for a process of the host. The RAM's memfd comes with it, opened read-only where the view is.
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
        /// Grows with each change of the target's RAM.
        generation: u64,
        /// Where the target's RAM is, all of it.
        regions: Vec<Region>,
    },
    /// The grant is made.
    Granted {
        /// Its number.
        grant: u64,
        /// Its token.
        #[serde(with = "token_text")]
        token: Token,
    },
    /// A page of grants.
    Grants {
        /// The grants, by ascending number. One with many views goes on in the next page, with other views.
        grants: Vec<GrantInfo>,
        /// Where the next page starts, if there is one.
        next: Option<Cursor>,
    },
    /// The grant is taken back.
    Revoked(Revoked),
    /// What tokens allow that KVMI makes for a target.
    Policy {
        /// The policy in force.
        policy: KvmiPolicy,
    },
    /// The VM is attached and registered.
    Added {
        /// The VM.
        target: TargetInfo,
        /// Where its RAM is.
        regions: Vec<Region>,
        /// How that became known.
        evidence: Evidence,
    },
    /// The token was pushed to this connection ([`FromBroker::Granted`], earlier in the stream): the peer has it.
    Pushed,
    /// A page of VMs.
    Targets {
        /// The VMs, by ascending id.
        targets: Vec<TargetInfo>,
        /// Whether there are more.
        more: bool,
    },
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

/// A hook, as a list shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookInfo {
    /// Where the tool listens.
    pub endpoint: Endpoint,
    /// Whether a tool is connected now.
    pub connected: bool,
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
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Malformed => "malformed",
            Self::Invalid => "invalid",
            Self::Exists => "exists",
            Self::Unknown => "unknown",
            Self::Denied => "denied",
            Self::Limit => "limit",
            Self::Busy => "busy",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_redeem_is_written_as_the_text_says() {
        let token = Token::from_bytes(&std::array::from_fn(|n| u8::try_from(n * 8 + 1).unwrap()));
        let request = Request { id: 1, call: Call::Redeem { token: token.clone() } };
        let text = serde_json::to_string(&request).unwrap();
        let digits = "0109111921293139414951596169717981899199a1a9b1b9c1c9d1d9e1e9f1f9";
        assert_eq!(text, format!("{{\"id\":1,\"call\":{{\"redeem\":{{\"token\":\"{digits}\"}}}}}}"));
        let read: Request = serde_json::from_str(&text.replace('f', "F")).unwrap();
        assert!(matches!(read.call, Call::Redeem { token: read } if read == token));
    }

    #[test]
    fn what_is_no_token_is_refused_without_repeating_it() {
        for digits in ["", "00", &"0".repeat(63), &"0".repeat(66), &"g".repeat(64), &"é".repeat(32)] {
            let text = format!("{{\"id\":1,\"call\":{{\"used\":{{\"token\":\"{digits}\"}}}}}}");
            let error = serde_json::from_str::<Request>(&text).unwrap_err().to_string();
            assert!(error.contains("64 hexadecimal digits"), "{error}");
        }
    }
}
