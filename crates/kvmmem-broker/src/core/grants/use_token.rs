// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tokens in use: for pages.

use std::time::Instant;

use kvmmem_kvmi::token::Token;
use kvmmem_proto::message::{GrantState, Origin};
use uuid::Uuid;

use super::error::UseError;
use super::grant::{Access, Grant, Holder, User, View};
use super::table::Grants;

impl Grants {
    /// What a token opens that this user may use now. No use is taken.
    pub(crate) fn would_open(
        &mut self,
        now: Instant,
        token: &Token,
        by: User,
    ) -> Result<Access, UseError> {
        self.usable(now, token, by).map(|(id, grant)| grant.access(id))
    }

    /// Whether a grant's token can be used now.
    pub(crate) fn is_active(&self, now: Instant, id: u64) -> bool {
        self.grants.get(&id).is_some_and(|grant| grant.state(now) == GrantState::Active)
    }

    /// Uses a token for one page. `None` where the token was pushed to this user, and is still
    /// there to be claimed.
    ///
    /// # Errors
    /// [`UseError`]; no use is taken then.
    pub(crate) fn redeem(
        &mut self,
        now: Instant,
        token: &Token,
        by: User,
    ) -> Result<Option<Access>, UseError> {
        let (id, grant) = self.usable(now, token, by)?;
        if grant.terms.holder == Holder::Pushed(by.peer) {
            return Ok(None);
        }
        let opened = grant.take_use_for_page(id, by.peer);
        self.of_peer.insert((by.peer, id));
        self.settle(now, id);
        Ok(Some(opened))
    }

    /// Records that this connection used a grant's token, which was pushed to it. The token may
    /// have expired, or the grant been revoked: the connection reports uses until it confirms.
    pub(crate) fn used(&mut self, now: Instant, id: u64, by: u64) -> Option<Access> {
        self.advance(now);
        let grant = self.grants.get_mut(&id)?;
        if grant.terms.holder != Holder::Pushed(by) || grant.uses_left == 0 {
            return None;
        }
        let opened = grant.take_use_for_page(id, by);
        self.of_peer.insert((by, id));
        self.settle(now, id);
        Some(opened)
    }

    /// Undoes a use of a token that a connection has taken for a page, or the push of the token to
    /// it: the target's files did not arrive. The connection has to redeem a token that was pushed.
    /// Returns whether it had either.
    pub(crate) fn undo_redeem(&mut self, now: Instant, id: u64, by: User) -> bool {
        let Some(grant) = self.grants.get_mut(&id) else { return false };
        if let Some(uses) = grant.users.get_mut(&by.peer) {
            *uses -= 1;
            grant.users.retain(|_, uses| *uses > 0);
            if !grant.peers().contains(&by.peer) {
                self.of_peer.remove(&(by.peer, id));
            }
            self.return_use(now, id);
            true
        } else if let Some(uuid) = by.uuid
            && grant.terms.holder == Holder::Pushed(by.peer)
        {
            self.not_pushed(id, uuid);
            true
        } else {
            false
        }
    }

    /// Takes out a view that its connection cannot use, if it is this connection's; an operator's
    /// token gets the use back.
    pub(crate) fn undo_attach(&mut self, now: Instant, view: u64, by: u64) -> Option<View> {
        let grant = self.views.get(&view).filter(|view| view.peer == by)?.grant;
        self.return_use(now, grant);
        self.close(now, view)
    }

    fn return_use(&mut self, now: Instant, id: u64) {
        if let Some(grant) = self.grants.get_mut(&id)
            && grant.terms.origin == Origin::Operator
        {
            grant.uses_left = grant.uses_left.saturating_add(1);
            if grant.state(now) == GrantState::Active {
                self.expiring.insert((grant.expires, id));
            }
        }
        self.settle(now, id);
    }

    /// Records that a token could not be pushed to its holder: the introspector with this UUID has
    /// to ask for it.
    pub(crate) fn not_pushed(&mut self, id: u64, holder: Uuid) {
        if let Some(grant) = self.grants.get_mut(&id)
            && let Holder::Pushed(peer) = grant.terms.holder
        {
            grant.terms.holder = Holder::Vm(holder);
            if !grant.users.contains_key(&peer) {
                self.of_peer.remove(&(peer, id));
            }
        }
    }

    /// The grant that a token opens for this user.
    pub(super) fn usable(
        &mut self,
        now: Instant,
        token: &Token,
        by: User,
    ) -> Result<(u64, &mut Grant), UseError> {
        self.advance(now);
        let id = self.find(token).ok_or(UseError::Unknown)?;
        Ok((id, self.usable_grant(now, id, by)?))
    }

    /// A grant whose token this user may use now.
    pub(super) fn usable_grant(
        &mut self,
        now: Instant,
        id: u64,
        by: User,
    ) -> Result<&mut Grant, UseError> {
        let grant = self.grants.get_mut(&id).ok_or(UseError::Unknown)?;
        if grant.state(now) != GrantState::Active || !grant.terms.holder.is(by) {
            return Err(UseError::Unknown);
        }
        if by.vm == Some(grant.terms.target) {
            return Err(UseError::Own);
        }
        Ok(grant)
    }

    pub(super) fn find(&self, token: &Token) -> Option<u64> {
        self.tokens.find(token, |id| self.grants.get(&id)?.token.as_deref())
    }
}
