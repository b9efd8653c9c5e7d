// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Grants of no use any more that are listed for a while.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use kvmmem_proto::message::Origin;

use super::grant::Terms;
use crate::core::limits::MAX_LEAVING;

/// Those grants, by the time at which they leave and their number.
#[derive(Clone, Debug, Default)]
pub(super) struct Leaving {
    all: BTreeSet<(Instant, u64)>,
    of_party: BTreeMap<Party, BTreeSet<(Instant, u64)>>,
}

/// Who causes grants: a user, or the tools of a target.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Party {
    User(u32),
    Target(u64),
}

impl Party {
    fn of(terms: &Terms) -> Self {
        match terms.origin {
            Origin::Operator => Self::User(terms.by.uid),
            Origin::Kvmi => Self::Target(terms.target),
        }
    }
}

impl Leaving {
    pub(super) fn insert(&mut self, terms: &Terms, until: Instant, id: u64) {
        self.all.insert((until, id));
        self.of_party.entry(Party::of(terms)).or_default().insert((until, id));
    }

    pub(super) fn remove(&mut self, terms: &Terms, until: Instant, id: u64) {
        self.all.remove(&(until, id));
        let party = Party::of(terms);
        if let Some(its) = self.of_party.get_mut(&party) {
            its.remove(&(until, id));
            if its.is_empty() {
                self.of_party.remove(&party);
            }
        }
    }

    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        let of_parties: usize = self.of_party.values().map(BTreeSet::len).sum();
        assert_eq!(self.all.len(), of_parties);
        of_parties
    }

    /// A grant that leaves by now. Where there are more than [`MAX_LEAVING`] it is the oldest of
    /// the party that has the most, so that no party pushes others' grants off the list.
    pub(super) fn due(&self, now: Instant) -> Option<u64> {
        let (_, id) = if self.all.len() > MAX_LEAVING {
            self.of_party.values().max_by_key(|its| its.len())?.first()?
        } else {
            self.all.first().filter(|(until, _)| *until <= now)?
        };
        Some(*id)
    }
}
