// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a peer's call does: the one place where calls are decided.

use std::time::Instant;

use kvmmem_kvmi::token::Token;
use kvmmem_proto::message::{Answer, Call, GrantRequest, KvmiPolicy, Refusal};
use uuid::Uuid;

use super::call_error::CallError;
use super::grants::Access;
use super::introduction::NotSent;
use super::machine::Core;
use super::revocation::Revocation;
use super::views::{AttachRequest, NewView};

/// What the edge brings to a call that the core cannot have.
#[derive(Debug, Default)]
pub(crate) struct Means {
    /// A token that was never used, for [`Call::Grant`].
    pub(crate) token: Option<Token>,
    /// Whether the peer has read all that was sent to it, and may get descriptors.
    pub(crate) may_get_files: bool,
}

/// What is left for the edge to do.
#[derive(Debug)]
pub(crate) enum Reply {
    /// Answer this.
    Answer(Answer),
    /// Answer nothing.
    Nothing,
    /// Let the peer read what was sent to it, and ask again.
    Unread(Call),
    /// A token was made.
    Granted { request: GrantRequest, token: Token, opened: Access },
    /// A token was used for a page; the answer goes after the pushes.
    Redeemed(Access),
    /// A pushed token was used for a page.
    Used(Access),
    /// A view was opened.
    Attached(NewView),
    /// A policy was set.
    PolicySet { uuid: Uuid, policy: KvmiPolicy },
    /// Wait for the revocation's confirmations.
    Revoking { grant: u64, revocation: Revocation },
    /// Wait for the copies from a view that are under way, and close it.
    Closing { view: u64 },
    /// The same for a view that the peer cannot use: its token gets the use back.
    Undoing { view: u64 },
    /// Wait for the peer's copies that are under way, and confirm a revocation.
    Confirming { grant: u64 },
    /// The peer may do this; it needs files, processes or threads.
    Allowed(Call),
}

impl Reply {
    /// The target that it is about.
    pub(crate) fn target(&self) -> Option<u64> {
        match self {
            Self::Granted { opened, .. } | Self::Redeemed(opened) | Self::Used(opened) => {
                Some(opened.target)
            }
            Self::Attached(attached) => Some(attached.opened.target),
            _ => None,
        }
    }
}

impl Core {
    /// Decides a peer's call. What is to be done for it besides is in the effects.
    pub(crate) fn handle(
        &mut self,
        now: Instant,
        who: u64,
        call: Call,
        means: &Means,
    ) -> Result<Reply, CallError> {
        let peer = self
            .peers
            .get(&who)
            .ok_or_else(|| CallError::new(Refusal::Denied, "this connection has ended"))?;
        peer.role().check(&call)?;
        let by = peer.credentials;
        Ok(match call {
            Call::Redeem { token } => match self.redeem(now, who, &token, means.may_get_files) {
                Ok(Some(opened)) => Reply::Redeemed(opened),
                Ok(None) => Reply::Answer(Answer::Pushed),
                Err(NotSent::Unread) => Reply::Unread(Call::Redeem { token }),
                Err(NotSent::Refused(refused)) => return Err(refused),
            },
            Call::Attach { token, caller, read_only, reaching } => {
                let request = AttachRequest { token, caller, read_only, reaching };
                match self.attach(now, who, &request, means.may_get_files) {
                    Ok(attached) => Reply::Attached(attached),
                    Err(NotSent::Unread) => {
                        let AttachRequest { token, caller, read_only, reaching } = request;
                        Reply::Unread(Call::Attach { token, caller, read_only, reaching })
                    }
                    Err(NotSent::Refused(refused)) => return Err(refused),
                }
            }
            Call::Used { grant } => Reply::Used(self.used(now, who, grant)?),
            Call::Detached { view, counters } => {
                self.begin_close(view, who, counters)?;
                Reply::Closing { view }
            }
            Call::Unreceived { target, introduction, unusable } => {
                let view = self.unreceived(now, who, (target, introduction), unusable)?;
                view.map_or(Reply::Nothing, |view| Reply::Undoing { view })
            }
            Call::Counters { view, counters } => {
                self.count(view, who, counters)?;
                Reply::Nothing
            }
            Call::RevokedDone { grant } => Reply::Confirming { grant },
            Call::Grant(request) => {
                let token = means.token.clone().ok_or_else(|| {
                    CallError::new(Refusal::Limit, "the system has no random bytes for a token")
                })?;
                let opened = self.grant(now, by, &request, &token)?;
                Reply::Granted { request, token, opened }
            }
            Call::Grants { after } => Reply::Answer(self.list_grants(now, after)),
            Call::Revoke { grant } => {
                Reply::Revoking { grant, revocation: self.revoke(now, grant)? }
            }
            Call::Policy { target, set } => {
                let (uuid, policy) = self.policy(by, &target, set)?;
                match set {
                    Some(_) => Reply::PolicySet { uuid, policy },
                    None => Reply::Answer(Answer::Policy { policy }),
                }
            }
            // Not the core's: the peer's role allows it.
            call => Reply::Allowed(call),
        })
    }
}
