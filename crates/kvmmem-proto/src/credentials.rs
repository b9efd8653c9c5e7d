// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Process and user of a peer, as the kernel reports them (SO_PEERCRED).

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
