// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The views of a VMM: opened by asking the broker, ended by the VMM or by the broker.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use kvmmem_kvmi::token::Token;
use kvmmem_proto::message::{Answer, Call, Caller, Request, ViewCounters};

use super::{Attached, RedeemError, Target, VmmLink};

/// How many revoked grants are remembered: far more than are taken back while one page is being
/// mapped.
const REVOKED_KEPT: usize = 1024;

/// The most requests for views that may be under way.
const MAX_UNDER_WAY: usize = 64;

/// The views that are open, and what has to be known of those that are being opened.
#[derive(Debug, Default)]
pub(super) struct Views {
    open: HashMap<u64, Open>,
    /// Grants that were taken back, the last ones.
    revoked: VecDeque<u64>,
    /// Tokens by which views are being opened, with the requests' numbers: they are of no use for
    /// anything else, also where they are pushed only now.
    under_way: Vec<(u64, Box<Token>)>,
}

#[derive(Clone, Copy, Debug)]
struct Open {
    grant: u64,
    target: u64,
}

impl Views {
    fn begin(&mut self, request: u64, token: &Token) {
        self.under_way.push((request, Box::new(token.clone())));
    }

    /// Whether a view is being opened by a token.
    pub(super) fn is_under_way(&self, token: &Token) -> bool {
        self.under_way.iter().any(|(_, other)| **other == *token)
    }

    /// Takes note of the answer to a request.
    pub(super) fn end_request(&mut self, request: u64) {
        self.under_way.retain(|(other, _)| *other != request);
    }

    /// Takes note of an open view; `false` where its grant was taken back meanwhile.
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

impl VmmLink {
    /// Uses a token to open a view, on behalf of a process of the guest. Asks the broker, and waits
    /// for it at most 2 s; a token that was used by [`Self::redeem`] a moment ago is used.
    ///
    /// Once the view is where [`super::ViewEvents`] finds it, the caller looks at
    /// [`Self::current`]: an event that came before has found nothing. A view that comes to
    /// nothing is told by [`Self::detached`].
    ///
    /// # Errors
    /// Where the token is not good, or the broker cannot say.
    pub fn attach(
        &self,
        token: &Token,
        caller: &Caller,
        read_only: bool,
    ) -> Result<Attached, RedeemError> {
        let mut state = self.shared.lock();
        let socket = state.socket.clone().ok_or(RedeemError::Unavailable)?;
        if state.views.under_way.len() >= MAX_UNDER_WAY {
            return Err(RedeemError::Unavailable);
        }
        state.cache.void(token);
        let id = state.begin_request();
        state.views.begin(id, token);
        drop(state);

        // What was used before is told before.
        let call = Call::Attach {
            token: token.clone(),
            caller: caller.clone(),
            read_only,
            reaching: Vec::new(),
        };
        let sent = self.shared.outbox.flush(&socket, Some(&Request { id, call }));
        let (mut state, answer) = self.answer(id, sent);
        if !sent {
            state.views.end_request(id);
        }
        let Answer::Attached { view, grant, target, scope } = answer? else {
            return Err(RedeemError::Unavailable);
        };
        let target = state.views.open.get(&view).and_then(|_| state.cache.target(target));
        Ok(Attached { view, grant, target: target.ok_or(RedeemError::Unknown)?, scope })
    }

    /// The target of a view as it is now; `None` once the view has ended: its grant was taken back,
    /// its target is gone, or the connection was lost.
    pub fn current(&self, view: u64) -> Option<Arc<Target>> {
        let state = self.shared.lock();
        let open = state.views.open.get(&view)?;
        state.cache.target(open.target)
    }

    /// Whether a grant was taken back lately. A page that was redeemed by it must not stay mapped.
    pub fn is_revoked(&self, grant: u64) -> bool {
        self.shared.lock().views.is_revoked(grant)
    }

    /// Tells that a view is closed.
    pub fn detached(&self, view: u64, counters: ViewCounters) {
        // One that has ended is no longer the broker's, and numbers start anew with each
        // connection.
        if self.shared.lock().views.open.remove(&view).is_some() {
            self.shared.outbox.push(Call::Detached { view, counters });
            self.shared.flush();
        }
    }

    /// Confirms that a grant which was taken back is of no use any more, where
    /// [`super::ViewEvents::revoke`] could not.
    pub fn revoked(&self, grant: u64) {
        self.shared.revoked(grant);
    }

    /// Tells a view's counters, as they are now.
    pub fn counters(&self, view: u64, counters: ViewCounters) {
        if self.shared.lock().views.open.contains_key(&view) {
            self.shared.outbox.push(Call::Counters { view, counters });
            self.shared.flush();
        }
    }
}
