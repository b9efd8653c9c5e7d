// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The connections, what each of them is by now, and which targets it knows.

use std::collections::BTreeMap;
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
    /// The targets that it hears of, with the numbers of their introductions; 0 where it gets the
    /// files otherwise.
    known: BTreeMap<u64, u64>,
    /// Number of its last introduction to a target.
    last_introduction: u64,
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
        Self {
            credentials,
            vm: None,
            has_views: false,
            known: BTreeMap::new(),
            last_introduction: 0,
        }
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
        if self.knows(target.id) {
            return Ok(None);
        }
        let layout = target.layout.as_ref().filter(|layout| !layout.is_private);
        let layout = Arc::clone(layout.ok_or(NotIntroduced::NoFiles)?);
        if !may_get_files {
            return Err(NotIntroduced::Unread);
        }
        self.last_introduction += 1;
        let introduction = self.last_introduction;
        self.known.insert(target.id, introduction);
        let identity = Arc::clone(&target.identity);
        let push = Push::Target { target: target.id, introduction, identity, layout };
        Ok(Some(Effect::Push { peer: number, push }))
    }

    /// The peer gets a target's files otherwise, and hears of the target from now on.
    pub(super) fn watch(&mut self, target: u64) {
        self.known.insert(target, 0);
    }

    pub(super) fn knows(&self, target: u64) -> bool {
        self.known.contains_key(&target)
    }

    /// Returns whether the peer knew the target.
    pub(super) fn forget(&mut self, target: u64) -> bool {
        self.known.remove(&target).is_some()
    }

    /// The files of a target did not arrive with this introduction; a later one stays, and a peer
    /// that needs none still hears of the target.
    pub(super) fn unreceived(&mut self, target: u64, introduction: u64) {
        if introduction > 0 && self.known.get(&target) == Some(&introduction) {
            self.known.remove(&target);
        }
    }
}
