// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The connections, what each of them is by now, and which targets it knows.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use kvmmem_proto::credentials::Credentials;

use super::effect::{Effect, Push};
use super::role::Role;
use super::vms::Vm;

/// A connection.
#[derive(Clone, Debug)]
pub(crate) struct Peer {
    pub(super) credentials: Credentials,
    /// The VM that it has registered.
    pub(super) vm: Option<u64>,
    /// Whether it has opened a view as a process of the host.
    pub(super) has_views: bool,
    /// The targets that it hears of.
    known: BTreeSet<u64>,
}

/// The connections by number.
pub(super) type Peers = BTreeMap<u64, Peer>;

/// Why a peer is not told of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum NotIntroduced {
    /// The peer has to read first what was sent to it.
    Unread,
    /// The peer maps what it gets, and this target's RAM cannot be mapped, or others may not look
    /// at it.
    NoFiles,
}

impl Peer {
    pub(super) fn new(credentials: Credentials) -> Self {
        Self { credentials, vm: None, has_views: false, known: BTreeSet::new() }
    }

    pub(super) fn role(&self) -> Role {
        if self.vm.is_some() {
            Role::Vmm
        } else if self.has_views {
            Role::Viewer
        } else if self.credentials.is_administrator() {
            Role::Administrator
        } else {
            Role::Operator
        }
    }

    /// Has the peer told of a target with its files, if it does not know it.
    pub(super) fn introduce(
        &mut self,
        number: u64,
        target: &Vm,
        may_get_files: bool,
    ) -> Result<Option<Effect>, NotIntroduced> {
        if self.known.contains(&target.id) {
            return Ok(None);
        }
        let layout = target.layout.as_ref().filter(|layout| !layout.is_private);
        let layout = Arc::clone(layout.ok_or(NotIntroduced::NoFiles)?);
        if !may_get_files {
            return Err(NotIntroduced::Unread);
        }
        self.known.insert(target.id);
        let identity = Arc::clone(&target.identity);
        let push = Push::Target { target: target.id, identity, layout };
        Ok(Some(Effect::Push { peer: number, push }))
    }

    /// The peer gets a target's files otherwise, and hears of the target from now on.
    pub(super) fn watch(&mut self, target: u64) {
        self.known.insert(target);
    }

    pub(super) fn knows(&self, target: u64) -> bool {
        self.known.contains(&target)
    }

    /// Returns whether the peer knew the target.
    pub(super) fn forget(&mut self, target: u64) -> bool {
        self.known.remove(&target)
    }
}
