// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Introduction of a target to a peer: the target's files go before the first use of its number.

use std::time::Instant;

use kvmmem_proto::map::SHARE_IT;
use kvmmem_proto::message::{Refusal, Unusable, VmIdentity};

use super::call_error::CallError;
use super::grants::{Access, Grants, User};
use super::machine::Core;
use super::peers::NotIntroduced;

/// Why a view is closed that its peer has no files for.
const UNUSABLE: &str = "unusable";

/// Why nothing was given out that goes with a target's files.
#[derive(Debug)]
pub(crate) enum NotSent {
    /// The peer has to read first what was sent to it: to be tried again.
    Unread,
    Refused(CallError),
}

impl From<CallError> for NotSent {
    fn from(refused: CallError) -> Self {
        Self::Refused(refused)
    }
}

impl Core {
    /// Gives something out under a grant once the peer knows the target, or is told of it first.
    pub(super) fn introducing<T>(
        &mut self,
        who: u64,
        target: u64,
        may_get_files: bool,
        give: impl FnOnce(&mut Grants) -> Result<T, CallError>,
    ) -> Result<T, NotSent> {
        let both = self.peers.get_mut(&who).zip(self.vms.get(target));
        let (peer, vm) = both.ok_or_else(CallError::busy)?;
        let introduced = peer.introduce(who, vm, may_get_files).map_err(|error| match error {
            NotIntroduced::Unread => NotSent::Unread,
            NotIntroduced::NoFiles => NotSent::Refused(CallError::busy()),
        })?;
        let given = give(&mut self.grants);
        if given.is_ok() {
            self.effects.extend(introduced);
        } else if introduced.is_some() {
            peer.forget(target);
        }
        Ok(given?)
    }

    /// Undoes what a peer has opened, or the push of a token to it: the target's files did not
    /// arrive there. The message may be late: views and introductions since then stay. A peer that
    /// lies has the files, and gets no more by another use. Returns a view that the caller undoes
    /// by [`Self::undo_view`] once no copy from it is under way.
    ///
    /// # Errors
    /// Where the peer's VM is no introspector.
    pub(crate) fn unreceived(
        &mut self,
        now: Instant,
        who: u64,
        (target, introduction): (u64, u64),
        unusable: Unusable,
    ) -> Result<Option<u64>, CallError> {
        let by = self.user(who)?;
        if let Some(peer) = self.peers.get_mut(&who) {
            peer.unreceived(target, introduction);
        }
        Ok(match unusable {
            Unusable::View(view) => self.grants.begin_close(view, who).then_some(view),
            Unusable::Token(grant) => {
                self.undo_use(now, grant, by);
                None
            }
        })
    }

    /// Closes a view that the peer could not use. The view may have ended meanwhile.
    pub(crate) fn undo_view(&mut self, now: Instant, view: u64, peer: u64) {
        if let Some(view) = self.remove_unused(now, view, peer) {
            self.closed(vec![view], UNUSABLE);
        }
    }

    /// Undoes a use of a token for a page: the target could not be sent to the peer.
    pub(crate) fn undo_redeem(&mut self, now: Instant, who: u64, opened: &Access) {
        self.not_introduced(who, opened.target);
        if let Ok(by) = self.user(who) {
            self.undo_use(now, opened.grant, by);
        }
    }

    fn undo_use(&mut self, now: Instant, grant: u64, by: User) {
        if self.grants.undo_redeem(now, grant, by) {
            self.released(grant, by.peer);
        }
    }
}

/// A VMM cannot map a target's RAM that is private; its token keeps its uses.
pub(super) fn private(identity: &VmIdentity) -> CallError {
    let name = &identity.name;
    let message =
        format!("the RAM of {name:?} is private to its VMM and cannot be mapped; {SHARE_IT}");
    CallError::new(Refusal::Unsupported, message)
}
