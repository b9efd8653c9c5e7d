// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a VM is for, from its kernel's command line.

/// The role of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Serve commands over vsock.
    Agent,
    /// Run one program, report it, power off.
    Host,
}

impl Role {
    /// The last `kvmmem.role=` on the command line.
    #[must_use]
    pub fn from_command_line(line: &str) -> Option<Self> {
        line.split_ascii_whitespace()
            .filter_map(|word| word.strip_prefix("kvmmem.role="))
            .next_back()
            .and_then(|role| match role {
                "agent" => Some(Self::Agent),
                "host" => Some(Self::Host),
                _ => None,
            })
    }
}

#[cfg(test)]
mod tests {
    use super::Role;

    #[test]
    fn the_last_role_counts_and_unknown_ones_are_none() {
        assert_eq!(Role::from_command_line("quiet kvmmem.role=host panic=-1\n"), Some(Role::Host));
        assert_eq!(
            Role::from_command_line("kvmmem.role=host kvmmem.role=agent"),
            Some(Role::Agent)
        );
        assert_eq!(Role::from_command_line("kvmmem.role=cook"), None);
        assert_eq!(Role::from_command_line("quiet"), None);
    }
}
