// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which connection may send which call: one table, which the connection looks at before it carries anything out.
//!
//! What a connection is follows from what it has done: one that has registered a VM belongs to that VM's VMM, and one
//! that has opened a view to a process of the host. Before that it is an operator's, and which calls it may send depends
//! on its user alone. A connection never goes back: a VMM that a guest has broken into must not make tokens by it.

#[cfg(test)]
mod tests;

use crate::broker::Refused;
use crate::endpoint::Endpoint;
use crate::wire::{Call, Refusal};

/// What a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Root or the broker's own user; it has neither registered a VM nor opened a view.
    Administrator,
    /// Another user, whom the socket's group lets in; it has neither registered a VM nor opened a view.
    Operator,
    /// A process of the host that has opened a view.
    Viewer,
    /// The VMM of a VM that it has registered.
    Vmm,
}

impl Call {
    /// Who may send the call. A call that is added needs its line here: there is no default.
    fn roles(&self) -> &'static [Role] {
        use Role::{Administrator, Operator, Viewer, Vmm};
        match self {
            Self::Register(_) => &[Administrator, Operator],
            Self::Redeem { .. } => &[Vmm],
            Self::Used { .. } => &[Vmm],
            Self::Attach { .. } => &[Administrator, Operator, Viewer, Vmm],
            Self::OpenCopies { .. } => &[Viewer],
            Self::Detached { .. } => &[Viewer, Vmm],
            Self::Counters { .. } => &[Viewer, Vmm],
            Self::RevokedDone { .. } => &[Viewer, Vmm],
            Self::RamChanged { .. } => &[Vmm],
            Self::Continued { .. } => &[Vmm],
            Self::VcpuAnswer { .. } => &[Vmm],
            Self::Grant(_) => &[Administrator, Operator],
            Self::Grants { .. } => &[Administrator, Operator],
            Self::Revoke { .. } => &[Administrator, Operator],
            Self::Policy { .. } => &[Administrator, Operator],
            Self::Targets { .. } => &[Administrator, Operator],
            Self::AddTarget { .. } => &[Administrator],
            Self::RemoveTarget { .. } => &[Administrator],
            Self::AddIntrospector { .. } => &[Administrator],
            Self::RemoveIntrospector { .. } => &[Administrator],
            Self::Room { .. } => &[Administrator, Operator],
            // Each of them may grant itself all of the target's memory, for writing as well: neither registers nor a pause
            // are more than that. A view may be of less.
            Self::Registers { .. } => &[Administrator, Operator],
            Self::Pause { .. } => &[Administrator, Operator],
            Self::Resume { .. } => &[Administrator, Operator],
            // The broker may connect where an operator may not; who may not make such a hook may not remove it either.
            Self::Hook { endpoint: Endpoint::Unix(_), .. } => &[Administrator],
            Self::Unhook { endpoint: Endpoint::Unix(_), .. } => &[Administrator],
            Self::Hook { endpoint: Endpoint::Vsock { .. }, .. } => &[Administrator, Operator],
            Self::Unhook { endpoint: Endpoint::Vsock { .. }, .. } => &[Administrator, Operator],
        }
    }
}

impl Role {
    /// Whether a connection may send a call.
    ///
    /// # Errors
    /// [`Refusal::Denied`], with what helps.
    pub(crate) fn check(self, call: &Call) -> Result<(), Refused> {
        let roles = call.roles();
        if roles.contains(&self) {
            return Ok(());
        }
        let message = match self {
            Self::Vmm => "a connection that has registered a VM may not do that; use another connection",
            Self::Viewer => "a connection that has opened a view may not do that; use another connection",
            Self::Operator if roles.contains(&Self::Administrator) => {
                "only root and the broker's own user may add and remove VMs, and hooks to a unix socket; try again \
                 as root"
            }
            Self::Administrator | Self::Operator if roles.contains(&Self::Viewer) => {
                "a connection may do that only once it has registered a VM or opened a view"
            }
            Self::Administrator | Self::Operator => {
                "only the connection that has registered a VM may do that"
            }
        };
        Err(Refused::new(Refusal::Denied, message))
    }
}
