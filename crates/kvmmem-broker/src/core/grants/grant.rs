// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One grant, and one view.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use kvmmem_kvmi::token::Token;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::{Caller, GrantState, Origin, ViewCounters};
use kvmmem_proto::scope::{Rights, Scope};
use uuid::Uuid;

/// Who may use a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    /// Anyone who has it.
    Anybody,
    /// The VMM to whose connection it was pushed.
    Pushed(u64),
    /// The VMM of the introspector that has this UUID.
    Vm(Uuid),
}

impl Holder {
    /// Whether this user may use the token.
    pub(super) fn is(self, user: User) -> bool {
        match self {
            Self::Anybody => true,
            Self::Pushed(peer) => peer == user.peer,
            Self::Vm(uuid) => user.uuid == Some(uuid),
        }
    }
}

/// Who brings a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct User {
    /// Number of the connection.
    pub peer: u64,
    /// Number of the VM that it has registered.
    pub vm: Option<u64>,
    /// UUID of that VM.
    pub uuid: Option<Uuid>,
}

/// What a grant is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Terms {
    /// Number of the target.
    pub target: u64,
    /// What it allows.
    pub scope: Scope,
    /// For how long the token may be used.
    pub lifetime: Duration,
    /// How often.
    pub uses: u32,
    /// By whom.
    pub holder: Holder,
    /// The operator's words.
    pub label: Option<String>,
    /// Who asked for it.
    pub origin: Origin,
    /// In whose name: of an operator's grant, the user who has it among those that there may be.
    pub by: Credentials,
}

/// What a token opened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Access {
    /// Number of the grant.
    pub(crate) grant: u64,
    /// Number of the target.
    pub(crate) target: u64,
    /// What is allowed.
    pub(crate) scope: Scope,
}

/// A grant in the table.
#[derive(Clone, Debug)]
pub(super) struct Grant {
    /// Boxed, so that moving the entry leaves no copy of it behind; wiped once it is of no use.
    pub(super) token: Option<Box<Token>>,
    pub(super) terms: Terms,
    pub(super) uses_left: u32,
    pub(super) expires: Instant,
    pub(super) revoked: bool,
    pub(super) views: BTreeSet<u64>,
    /// Connections that have used the token for pages, and how often.
    pub(super) users: BTreeMap<u64, u32>,
    /// When it leaves the table, once it is of no use.
    pub(super) leaves: Option<Instant>,
    /// Whether it has its share of a limit.
    pub(super) is_counted: bool,
}

impl Grant {
    pub(super) fn new(now: Instant, token: Token, terms: Terms) -> Self {
        Self {
            token: Some(Box::new(token)),
            uses_left: terms.uses,
            expires: now + terms.lifetime,
            revoked: false,
            views: BTreeSet::new(),
            users: BTreeMap::new(),
            leaves: None,
            is_counted: true,
            terms,
        }
    }

    pub(super) fn state(&self, now: Instant) -> GrantState {
        if self.revoked {
            GrantState::Revoked
        } else if self.uses_left == 0 {
            GrantState::Spent
        } else if self.expires <= now {
            GrantState::Expired
        } else {
            GrantState::Active
        }
    }

    /// Whether something is open under it. Pages mapped with KVMI tokens are not counted: a tool
    /// has tens of thousands of them.
    pub(super) fn is_in_use(&self) -> bool {
        !self.views.is_empty() || self.may_be_returned()
    }

    /// Whether a peer may still report that it cannot use what it has opened, so that a use comes
    /// back. KVMI's tokens live for seconds, and a tool asks for another one.
    pub(super) fn may_be_returned(&self) -> bool {
        self.terms.origin == Origin::Operator && !(self.views.is_empty() && self.users.is_empty())
    }

    /// Connections that hold its token, or have used it for pages.
    pub(super) fn peers(&self) -> BTreeSet<u64> {
        let mut peers: BTreeSet<u64> = self.users.keys().copied().collect();
        if let Holder::Pushed(peer) = self.terms.holder {
            peers.insert(peer);
        }
        peers
    }

    /// Takes a use for a page.
    pub(super) fn take_use_for_page(&mut self, id: u64, by: u64) -> Access {
        let uses = self.users.entry(by).or_default();
        *uses = uses.saturating_add(1);
        self.take_use(id)
    }

    /// Takes a use.
    pub(super) fn take_use(&mut self, id: u64) -> Access {
        self.uses_left = self.uses_left.saturating_sub(1);
        self.access(id)
    }

    /// What its token opens.
    pub(super) fn access(&self, id: u64) -> Access {
        Access { grant: id, target: self.terms.target, scope: self.terms.scope.clone() }
    }
}

/// An open view.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct View {
    /// Its number.
    pub id: u64,
    /// Number of its grant.
    pub grant: u64,
    /// Number of its target.
    pub target: u64,
    /// Number of the connection that has it.
    pub peer: u64,
    /// Name of the introspector, or `host`.
    pub by: String,
    /// UUID of the introspector.
    pub by_uuid: Option<Uuid>,
    /// Process that attached it.
    pub caller: Caller,
    /// Its rights, which may be less than the grant's.
    pub rights: Rights,
    /// When it was opened.
    pub since: Instant,
    /// What has happened to it.
    pub counters: ViewCounters,
    /// It waits for the copies that are under way, and begins no other.
    pub is_closing: bool,
}
