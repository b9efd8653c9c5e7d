// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the broker does once the core has decided and its lock is released.

use std::sync::Arc;
use std::time::Duration;

use kvmmem_kvmi::token::Token;
use kvmmem_proto::message::VmIdentity;

use super::grants::{Access, View};
use super::layout::Layout;

/// Something to do.
#[derive(Clone, Debug)]
pub(crate) enum Effect {
    /// Send this to a peer, in the order of the effects.
    Push { peer: u64, push: Push },
    /// Write down that a view has ended.
    Closed { view: View, reason: &'static str },
    /// A revocation may be done.
    Confirmed,
}

/// What a peer is told unasked.
#[derive(Clone, Debug)]
pub(crate) enum Push {
    /// A target, with the files of its RAM, before the first use of its number.
    Target { target: u64, introduction: u64, identity: Arc<VmIdentity>, layout: Arc<Layout> },
    /// A token for the peer.
    Granted { token: Token, opened: Access, lifetime: Duration },
    /// A grant was revoked.
    Revoke { grant: u64 },
    /// A target is gone.
    Gone { target: u64 },
    /// Where the RAM of a target is now.
    Changed { target: u64, layout: Arc<Layout> },
}
