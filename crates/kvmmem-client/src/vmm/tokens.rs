// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tokens of a VMM: traded for a target, or used to open a view.

use std::collections::HashMap;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvmmem_kvmi::token::Token;
use kvmmem_proto::message::{Answer, Call, Caller, Request, ViewCounters};

use super::error::RedeemError;
use super::link::VmmLink;
use super::state::State;
use super::target::{PageGrant, Target, ViewGrant};
use super::views::{MAX_UNDER_WAY, Open};

/// How long [`VmmLink::redeem`] and [`VmmLink::attach`] wait for the broker.
const ANSWER_LIMIT: Duration = Duration::from_secs(2);

impl VmmLink {
    /// Trades a token for a target, to map one of its pages; takes one use of the token.
    ///
    /// A token that was pushed to this VM costs no round trip; else the broker is asked, and waited
    /// for at most 2 s. Once the page is mapped where [`super::ViewEvents::revoke`] finds it, the
    /// caller looks at [`Self::is_revoked`].
    ///
    /// # Errors
    /// Where the token is not good, or the broker cannot say.
    pub fn redeem(&self, token: &Token) -> Result<PageGrant, RedeemError> {
        let mut state = self.shared.lock();
        let socket = state.socket.clone().ok_or(RedeemError::Unavailable)?;
        if let Some(redeemed) = self.claim_from(&mut state, token) {
            return Ok(redeemed);
        }
        let id = state.begin_request();
        drop(state);

        // What could not be used before is told before: the target's files come again then.
        let call = Call::Redeem { token: token.clone() };
        let sent = self.shared.outbox.flush(&socket, Some(&Request { id, call }));
        let (mut state, answer) = self.answer(id, sent);
        match answer? {
            Answer::Redeemed { grant, target, scope } => {
                let target = state.cache.target(target).ok_or(RedeemError::Unavailable)?;
                Ok(PageGrant { grant, target, scope })
            }
            Answer::Pushed => self.claim_from(&mut state, token).ok_or(RedeemError::Unknown),
            _ => Err(RedeemError::Unavailable),
        }
    }

    /// As [`Self::redeem`], for a token that was pushed to this VM.
    pub fn claim(&self, token: &Token) -> Option<PageGrant> {
        self.claim_from(&mut self.shared.lock(), token)
    }

    fn claim_from(&self, state: &mut State, token: &Token) -> Option<PageGrant> {
        let redeemed = state.cache.claim(Instant::now(), token)?;
        self.shared.outbox.push(Call::Used { grant: redeemed.grant });
        Some(redeemed)
    }

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
    ) -> Result<ViewGrant, RedeemError> {
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
        Ok(ViewGrant { view, grant, target: target.ok_or(RedeemError::Unknown)?, scope })
    }

    /// The target of a view as it is now; `None` once the view has ended: its grant was revoked,
    /// its target is gone, or the connection was lost.
    pub fn current(&self, view: u64) -> Option<Arc<Target>> {
        let state = self.shared.lock();
        let open = state.views.open.get(&view)?;
        state.cache.target(open.target)
    }

    /// Whether a grant was revoked lately. A page that was redeemed by it must not stay mapped.
    pub fn is_revoked(&self, grant: u64) -> bool {
        self.shared.lock().views.is_revoked(grant)
    }

    /// Reports that a view is closed.
    pub fn detached(&self, view: u64, counters: ViewCounters) {
        self.report(Call::Detached { view, counters }, |open| open.remove(&view).is_some());
    }

    /// Confirms that nothing is reached by a revoked grant any more, where
    /// [`super::ViewEvents::revoke`] could not.
    pub fn revoked(&self, grant: u64) {
        self.shared.revoked(grant);
    }

    /// Reports a view's counters, as they are now.
    pub fn counters(&self, view: u64, counters: ViewCounters) {
        self.report(Call::Counters { view, counters }, |open| open.contains_key(&view));
    }

    /// Reports something about a view that is open. One that has ended is no longer the broker's,
    /// and numbers start anew with each connection, which is made with the same lock held.
    fn report(&self, call: Call, is_open: impl FnOnce(&mut HashMap<u64, Open>) -> bool) {
        let mut state = self.shared.lock();
        if is_open(&mut state.views.open) {
            self.shared.outbox.push(call);
            drop(state);
            self.shared.flush();
        }
    }

    /// Waits for the answer to a request.
    fn answer(
        &self,
        id: u64,
        is_sent: bool,
    ) -> (MutexGuard<'_, State>, Result<Answer, RedeemError>) {
        let deadline = Instant::now() + ANSWER_LIMIT;
        let mut state = self.shared.lock();
        let answer = loop {
            // A lost connection takes the entry away.
            if !is_sent || !matches!(state.waiting.get(&id), Some(None)) {
                break state.waiting.remove(&id).flatten();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                state.waiting.remove(&id);
                break None;
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        (state, answer.unwrap_or(Err(RedeemError::Unavailable)))
    }
}
