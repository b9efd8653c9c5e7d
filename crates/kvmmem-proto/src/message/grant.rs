// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Grants and views, as they are asked for and listed.

use std::fmt;
use std::time::Duration;

use kvmmem_kvmi::token::Token;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::token_text;
use crate::name::is_unprintable;
use crate::scope::{Rights, Scope, Span};

/// What an operator asks for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantRequest {
    /// Name or UUID of the target.
    pub target: String,
    /// Where; `None` for all RAM.
    pub spans: Option<Vec<Span>>,
    /// Whether memory may be written.
    pub rights: Rights,
    /// How long the token may be used, milliseconds: 1 to 30 days. What it has opened lasts
    /// longer.
    pub ttl_ms: u64,
    /// How often, at least once.
    pub uses: u32,
    /// UUID of the only introspector that may use it, registered or not; `None` for any holder of
    /// the token.
    pub holder: Option<Uuid>,
    /// What a list shows: at most 64 bytes, no control characters.
    pub label: Option<String>,
}

impl GrantRequest {
    /// The longest time for which a token may be used.
    pub const MAX_TTL: Duration = Duration::from_secs(30 * 24 * 60 * 60);

    /// The longest label, bytes.
    pub const MAX_LABEL: usize = 64;

    /// Whether a grant may have this label.
    pub fn is_label(text: &str) -> bool {
        text.len() <= Self::MAX_LABEL && !text.chars().any(is_unprintable)
    }
}

/// A grant that was made.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct NewGrant {
    /// Its number, by which it is listed and revoked.
    pub grant: u64,
    /// Its token. Nothing shows it again.
    #[serde(with = "token_text")]
    pub token: Token,
}

/// A grant, as a list shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct GrantInfo {
    /// Its number.
    pub id: u64,
    /// Name of the target.
    pub target: String,
    /// UUID of the target.
    pub target_uuid: Uuid,
    /// What it allows.
    pub scope: Scope,
    /// How often its token may still be used.
    pub uses_left: u32,
    /// How long it may still be used, milliseconds.
    pub expires_in_ms: u64,
    /// UUID of the only introspector that may use it.
    pub holder: Option<Uuid>,
    /// The operator's words.
    pub label: Option<String>,
    /// Who asked for it.
    pub origin: Origin,
    /// Whether its token can be used.
    pub state: GrantState,
    /// What it has opened, and is still open.
    pub views: Vec<ViewInfo>,
}

/// Who asked for a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Origin {
    /// A tool, by KVMI's GET_MAP_TOKEN.
    Kvmi,
    /// A user of the host.
    Operator,
}

/// Whether a grant's token can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum GrantState {
    /// It can.
    Active,
    /// It was used as often as it may be.
    Spent,
    /// Its time is over.
    Expired,
    /// It was revoked, and its views were closed.
    Revoked,
}

/// An open view, as a list shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewInfo {
    /// Its number.
    pub id: u64,
    /// Name of the introspector, or `host`.
    pub by: String,
    /// UUID of the introspector; `None` for a process of the host.
    pub by_uuid: Option<Uuid>,
    /// Process that attached it; in an introspector, as the guest's kernel says.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its name.
    pub comm: String,
    /// For how long the view has been open, milliseconds.
    pub attached_ms: u64,
    /// What has happened to it.
    pub counters: ViewCounters,
}

/// The process that asks for a view. Inside an introspector this is what the guest's kernel claims:
/// it is written to the audit log and believed no further.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Caller {
    /// Process id.
    pub pid: u32,
    /// User id.
    pub uid: u32,
    /// Name.
    pub comm: String,
}

impl Caller {
    /// This process.
    pub fn this_process() -> Self {
        let comm = std::fs::read_to_string("/proc/self/comm").unwrap_or_default();
        Self {
            pid: std::process::id(),
            uid: rustix::process::getuid().as_raw(),
            comm: comm.trim_end().to_owned(),
        }
    }
}

/// What has happened to a view.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ViewCounters {
    /// How often its data and holes were looked for.
    pub seeks: u64,
    /// Writes that the host refused because the view is read-only.
    pub refused_writes: u64,
}

/// The outcome of revoking a grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RevokeReport {
    /// Views that were open.
    pub views: u32,
    /// VMMs and processes of the host that use the grant and have not confirmed in time that they
    /// no longer do.
    pub unconfirmed: u32,
    /// How long it took, microseconds.
    pub micros: u64,
}

/// Access that tokens issued over KVMI give to a target.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum KvmiPolicy {
    /// Reading and writing all RAM.
    #[default]
    #[serde(rename = "rw")]
    ReadWrite,
    /// Reading all RAM; no use for v1 mappings, which are read-write.
    #[serde(rename = "ro")]
    ReadOnly,
    /// Nothing: no token is made.
    #[serde(rename = "none")]
    None,
}

impl KvmiPolicy {
    /// What a token allows; `None` where none is made.
    pub fn scope(self) -> Option<Scope> {
        match self {
            Self::ReadWrite => Some(Scope::whole(Rights::ReadWrite)),
            Self::ReadOnly => Some(Scope::whole(Rights::ReadOnly)),
            Self::None => None,
        }
    }
}

impl fmt::Display for KvmiPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::ReadWrite => "rw",
            Self::ReadOnly => "ro",
            Self::None => "none",
        })
    }
}

/// A place in the list of grants and their views.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Cursor {
    /// Everything of the grants below this number was listed.
    pub grant: u64,
    /// And of this grant the views up to this number.
    pub view: u64,
}
