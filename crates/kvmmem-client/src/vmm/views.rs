// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The views of a VMM: opened by asking the broker, ended by the VMM or by the broker.

use std::collections::{HashMap, VecDeque};

use kvmmem_kvmi::token::Token;

/// How many revoked grants are remembered: far more than are revoked while one page is being
/// mapped.
const REVOKED_KEPT: usize = 1024;

/// The most requests for views that may be under way.
pub(super) const MAX_UNDER_WAY: usize = 64;

/// The views that are open, and what has to be known of those that are being opened.
#[derive(Debug, Default)]
pub(super) struct Views {
    pub(super) open: HashMap<u64, Open>,
    /// The grants that were revoked last.
    revoked: VecDeque<u64>,
    /// Tokens by which views are being opened, with the requests' numbers: they are of no use for
    /// anything else, also where they are pushed only now.
    pub(super) under_way: Vec<(u64, Box<Token>)>,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct Open {
    grant: u64,
    pub(super) target: u64,
}

impl Views {
    pub(super) fn begin(&mut self, request: u64, token: &Token) {
        self.under_way.push((request, Box::new(token.clone())));
    }

    /// Whether a view is being opened by a token.
    pub(super) fn is_under_way(&self, token: &Token) -> bool {
        self.under_way.iter().any(|(_, other)| **other == *token)
    }

    /// Records the answer to a request.
    pub(super) fn end_request(&mut self, request: u64) {
        self.under_way.retain(|(other, _)| *other != request);
    }

    /// Records an open view; `false` where its grant was revoked meanwhile.
    pub(super) fn open(&mut self, view: u64, grant: u64, target: u64) -> bool {
        if self.is_revoked(grant) {
            return false;
        }
        self.open.insert(view, Open { grant, target });
        true
    }

    pub(super) fn is_revoked(&self, grant: u64) -> bool {
        self.revoked.contains(&grant)
    }

    /// Ends the views of a grant.
    pub(super) fn revoke(&mut self, grant: u64) {
        self.open.retain(|_, open| open.grant != grant);
        if self.revoked.len() >= REVOKED_KEPT {
            self.revoked.pop_front();
        }
        self.revoked.push_back(grant);
    }

    /// Ends the views of a target.
    pub(super) fn forget(&mut self, target: u64) {
        self.open.retain(|_, open| open.target != target);
    }
}
