// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Process and user of a peer, as the kernel reports them (SO_PEERCRED), and groups.

use std::io;

/// Who is at the other end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process id.
    pub pid: u32,
    /// User id.
    pub uid: u32,
}

impl Credentials {
    /// Whether it is root or the broker's own user, who may do all that the broker can. Members of
    /// the socket's group may give out what VMMs have registered, and no more: other VMs, and
    /// other users' sockets, are not theirs.
    pub fn is_administrator(self) -> bool {
        self.uid == 0 || self.uid == rustix::process::geteuid().as_raw()
    }
}

/// The number of a group, given by name or number.
///
/// # Errors
/// Where `/etc/group` cannot be read or has no such group.
pub fn group_id(group: &str) -> io::Result<u32> {
    if let Ok(id) = group.parse() {
        return Ok(id);
    }
    let text = std::fs::read_to_string("/etc/group")?;
    let find = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (name == group).then(|| fields.nth(1)?.parse().ok()).flatten()
    };
    let missing =
        || io::Error::new(io::ErrorKind::NotFound, format!("there is no group {group:?}"));
    text.lines().find_map(find).ok_or_else(missing)
}
