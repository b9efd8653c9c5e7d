// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which connection may send which call: one table, which the connection looks at before it carries
//! anything out.
//!
//! What a connection is follows from what it has done: one that has registered a VM belongs to that
//! VM's VMM, and one that has opened a view to a process of the host. Before that it is an
//! operator's, and which calls it may send depends on its user alone. A connection never goes back:
//! a VMM that a guest has broken into must not make tokens by it.

#[cfg(test)]
mod tests;

use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::message::{Call, Refusal};

use super::call_error::CallError;

/// What a connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// Root or the broker's own user; it has neither registered a VM nor opened a view.
    Administrator,
    /// Another user, whom the socket's group lets in; it has neither registered a VM nor opened a
    /// view.
    Operator,
    /// A process of the host that has opened a view.
    Viewer,
    /// The VMM of a VM that it has registered.
    Vmm,
}

/// Who may send a call. A call that is added needs its line here: there is no default.
fn roles(call: &Call) -> &'static [Role] {
    use Role::{Administrator, Operator, Viewer, Vmm};
    match call {
        Call::Register(_) => &[Administrator, Operator],
        Call::Redeem { .. } => &[Vmm],
        Call::Used { .. } => &[Vmm],
        Call::Attach { .. } => &[Administrator, Operator, Viewer, Vmm],
        Call::OpenCopies { .. } => &[Viewer],
        Call::Detached { .. } => &[Viewer, Vmm],
        Call::Unreceived { .. } => &[Viewer, Vmm],
        Call::Counters { .. } => &[Viewer, Vmm],
        Call::RevokedDone { .. } => &[Viewer, Vmm],
        Call::RamChanged { .. } => &[Vmm],
        Call::Continued { .. } => &[Vmm],
        Call::VcpuAnswer { .. } => &[Vmm],
        Call::Grant(_) => &[Administrator, Operator],
        Call::Grants { .. } => &[Administrator, Operator],
        Call::Revoke { .. } => &[Administrator, Operator],
        Call::Policy { .. } => &[Administrator, Operator],
        Call::Targets { .. } => &[Administrator, Operator],
        Call::AddTarget { .. } => &[Administrator],
        Call::RemoveTarget { .. } => &[Administrator],
        Call::AddIntrospector { .. } => &[Administrator],
        Call::RemoveIntrospector { .. } => &[Administrator],
        Call::FreeSlots { .. } => &[Administrator, Operator],
        // Each of them may grant itself all of the target's memory, for writing as well: neither
        // registers nor a pause are more than that. A view may be of less.
        Call::Registers { .. } => &[Administrator, Operator],
        Call::Pause { .. } => &[Administrator, Operator],
        Call::Resume { .. } => &[Administrator, Operator],
        // The broker may connect where an operator may not; who may not make such a hook may not
        // remove it either.
        Call::Hook { endpoint: Endpoint::Unix(_), .. } => &[Administrator],
        Call::Unhook { endpoint: Endpoint::Unix(_), .. } => &[Administrator],
        Call::Hook { endpoint: Endpoint::Vsock { .. }, .. } => &[Administrator, Operator],
        Call::Unhook { endpoint: Endpoint::Vsock { .. }, .. } => &[Administrator, Operator],
    }
}

impl Role {
    /// Whether a connection may send a call.
    ///
    /// # Errors
    /// [`Refusal::Denied`], with what helps.
    pub(crate) fn check(self, call: &Call) -> Result<(), CallError> {
        let roles = roles(call);
        if roles.contains(&self) {
            return Ok(());
        }
        let message = match self {
            Self::Vmm => {
                "a connection that has registered a VM may not do that; use another connection"
            }
            Self::Viewer => {
                "a connection that has opened a view may not do that; use another connection"
            }
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
        Err(CallError::new(Refusal::Denied, message))
    }
}
