// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How many connections, VMs, hooks, channels, grants and policies the broker takes, and how long
//! it waits.

use std::time::Duration;

use super::quota::Bound;

/// The most connections at a time: each that is not idle has a thread.
pub(crate) const MAX_CONNECTIONS: usize = 2560;

/// The most VMs that are registered at a time.
pub(crate) const MAX_VMS: usize = 2048;

/// The most hooks of all targets.
const MAX_HOOKS: usize = 4096;

/// The most channels for copies of all views: each has a thread.
const MAX_CHANNELS: usize = 256;

/// The most grants of operators, of all targets, that can be used or are in use.
pub(crate) const MAX_OPERATOR: usize = 16_384;

/// How long a token lives that KVMI makes.
pub(crate) const KVMI_LIFETIME: Duration = Duration::from_secs(3);

/// The most tokens of KVMI's that may be outstanding for one target.
pub(crate) const MAX_KVMI_PER_TARGET: usize = 64;

/// How long a grant is listed that is of no use any more.
pub(crate) const KEPT: Duration = Duration::from_secs(60);

/// The most views that one connection may have open.
pub(crate) const MAX_VIEWS_PER_PEER: usize = 64;

/// The most grants that are listed though they are of no use any more.
pub(crate) const MAX_LEAVING: usize = 1024;

/// The most targets that have a policy of their own.
pub(crate) const MAX_POLICIES: usize = 4096;

/// What the broker bounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Connections.
    pub connections: Bound,
    /// Registered VMs.
    pub vms: Bound,
    /// Hooks of all targets.
    pub hooks: Bound,
    /// Channels for copies, of all views.
    pub channels: Bound,
    /// Operators' grants that can be used or are in use.
    pub grants: Bound,
    /// Targets that have a policy of their own.
    pub policies: Bound,
    /// How long a connection may be silent that has neither registered a VM nor opened a view.
    pub silence: Duration,
    /// How long a revocation waits for confirmations.
    pub confirmation: Duration,
    /// How long a token lives that KVMI makes.
    pub kvmi_lifetime: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: Bound::of(MAX_CONNECTIONS),
            vms: Bound::of(MAX_VMS),
            hooks: Bound::of(MAX_HOOKS),
            channels: Bound::of(MAX_CHANNELS),
            grants: Bound::of(MAX_OPERATOR),
            policies: Bound::of(MAX_POLICIES),
            silence: Duration::from_secs(10),
            confirmation: Duration::from_secs(2),
            kvmi_lifetime: KVMI_LIFETIME,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_usual_shares_leave_others_and_root_some() {
        for total in [MAX_CONNECTIONS, MAX_VMS, MAX_HOOKS, MAX_OPERATOR, MAX_POLICIES] {
            let Bound { per_user, reserve, .. } = Bound::of(total);
            assert!(reserve >= 8 && per_user + reserve < total);
        }
    }
}
