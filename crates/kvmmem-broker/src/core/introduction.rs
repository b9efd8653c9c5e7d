// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Introduction of a target to a peer: the target's files go before the first use of its number.

use std::time::Instant;

use kvmmem_proto::map::SHARE_IT;
use kvmmem_proto::message::{Refusal, VmIdentity};

use super::call_error::CallError;
use super::grants::Grants;
use super::machine::Core;
use super::peers::NotIntroduced;

/// Why a view is closed whose target's files have not arrived.
const NO_FILES: &str = "its VMM has no file descriptors left";

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
    /// Gives something out under a grant once the peer knows the target, or is told of it first:
    /// `give` gets whether the target's files are sent.
    pub(super) fn introducing<T>(
        &mut self,
        who: u64,
        target: u64,
        may_get_files: bool,
        give: impl FnOnce(&mut Grants, bool) -> Result<T, CallError>,
    ) -> Result<T, NotSent> {
        let both = self.peers.get_mut(&who).zip(self.vms.get(target));
        let (peer, vm) = both.ok_or_else(CallError::busy)?;
        let introduced = peer.introduce(who, vm, may_get_files).map_err(|error| match error {
            NotIntroduced::Unread => NotSent::Unread,
            NotIntroduced::NoFiles => NotSent::Refused(CallError::busy()),
        })?;
        let given = give(&mut self.grants, introduced.is_some());
        if given.is_ok() {
            self.effects.extend(introduced);
        } else if introduced.is_some() {
            peer.forget(target);
        }
        Ok(given?)
    }

    /// Undoes what a peer has opened by a grant, or the push of its token: the target's files have
    /// not arrived there. An operator's token gets its use back. A peer that lies has the files, and
    /// gets no more by another use.
    ///
    /// # Errors
    /// Where the peer has nothing by that grant.
    pub(crate) fn unreceived(
        &mut self,
        now: Instant,
        who: u64,
        grant: u64,
    ) -> Result<(), CallError> {
        let by = self.user(who)?;
        let (target, closed) = self.grants.unreceived(now, grant, by).ok_or_else(|| {
            let message = format!("this connection has nothing by grant {grant}");
            CallError::new(Refusal::Unknown, message)
        })?;
        self.not_introduced(who, target);
        self.closed(closed, NO_FILES);
        self.released(grant, who);
        Ok(())
    }
}

/// A VMM cannot map a target's RAM that is private; its token keeps its uses.
pub(super) fn private(identity: &VmIdentity) -> CallError {
    let name = &identity.name;
    let message =
        format!("the RAM of {name:?} is private to its VMM and cannot be mapped; {SHARE_IT}");
    CallError::new(Refusal::Unsupported, message)
}
