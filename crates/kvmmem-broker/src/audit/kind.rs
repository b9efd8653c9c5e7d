// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kinds of events.

/// The kind of an event, by which lines are limited.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Kind {
    Registered,
    Added,
    TakenOver,
    AddedIntrospector,
    Gone,
    Refused,
    Hook,
    Connected,
    Disconnected,
    NewToken,
    NotMinted,
    Granted,
    Used,
    Attached,
    Detached,
    Revoked,
    Policy,
    RamChanged,
    Registers,
    Paused,
    Resumed,
    Silent,
    PortRetired,
}

impl Kind {
    /// How many kinds there are.
    #[cfg(test)]
    pub(crate) const COUNT: usize = Self::PortRetired as usize + 1;

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Registered => "registered",
            Self::Added => "added",
            Self::TakenOver => "taken_over",
            Self::AddedIntrospector => "added_introspector",
            Self::Gone => "gone",
            Self::Refused => "refused",
            Self::Hook => "hook",
            Self::Connected => "connected",
            Self::Disconnected => "disconnected",
            Self::NewToken => "minted",
            Self::NotMinted => "not_minted",
            Self::Granted => "granted",
            Self::Used => "used",
            Self::Attached => "attached",
            Self::Detached => "detached",
            Self::Revoked => "revoked",
            Self::Policy => "policy",
            Self::RamChanged => "ram_changed",
            Self::Registers => "registers",
            Self::Paused => "paused",
            Self::Resumed => "resumed",
            Self::Silent => "silent",
            Self::PortRetired => "port_retired",
        }
    }
}
