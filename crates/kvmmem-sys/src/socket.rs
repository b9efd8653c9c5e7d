// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kernel's view of a connected unix socket: the peer's credentials, and the bytes it has not read.
//!
//! `rustix::net::sockopt::socket_peercred` returns the process id as a `NonZero`, and the kernel
//! reports 0 for a peer outside this process's pid namespace.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use libc::{c_int, c_void, socklen_t, ucred};

/// The process at the other end of a unix socket, as it was when it connected or began to listen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerCredentials {
    /// Process id; `None` for a process outside this one's pid namespace.
    pub pid: Option<u32>,
    /// User id.
    pub uid: u32,
}

/// The peer of a connected unix socket (`SO_PEERCRED`).
///
/// # Errors
/// Those of `getsockopt`; `InvalidData` where no process is at the other end.
pub fn peer_credentials(socket: impl AsFd) -> io::Result<PeerCredentials> {
    let mut credentials = ucred { pid: 0, uid: u32::MAX, gid: u32::MAX };
    let mut size = socklen_t::try_from(size_of::<ucred>()).map_err(io::Error::other)?;
    // SAFETY: `credentials` and `size` are valid for writes of what they are, and `size` has the
    // length of the former, beyond which the kernel does not write; any bytes are a `ucred`,
    // three integers. Both outlive the call.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut credentials).cast::<c_void>(),
            &raw mut size,
        )
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    if credentials.uid == u32::MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the socket has no peer"));
    }
    let pid = u32::try_from(credentials.pid).ok().filter(|pid| *pid != 0);
    Ok(PeerCredentials { pid, uid: credentials.uid })
}

/// How much of what was sent on a unix socket the peer has not read, bytes of kernel memory
/// (`SIOCOUTQ`).
///
/// # Errors
/// Those of `ioctl`.
pub fn unread(socket: impl AsFd) -> io::Result<usize> {
    let mut bytes: c_int = 0;
    // SAFETY: SIOCOUTQ (the number of TIOCOUTQ) writes one `int`, for which `bytes` is valid and
    // which it outlives.
    let failed = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(usize::try_from(bytes).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn the_peer_of_a_pair_is_this_process() {
        let (one, _other) = UnixStream::pair().unwrap();
        let peer = peer_credentials(&one).unwrap();
        assert_eq!(peer.pid, Some(std::process::id()));
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        assert!(peer_credentials(std::fs::File::open("/dev/null").unwrap()).is_err());
    }

    #[test]
    fn what_the_peer_reads_is_no_longer_unread() {
        let (mut one, mut other) = UnixStream::pair().unwrap();
        assert_eq!(unread(&one).unwrap(), 0);
        one.write_all(b"abc").unwrap();
        assert!(unread(&one).unwrap() >= 3);
        other.read_exact(&mut [0; 3]).unwrap();
        assert_eq!(unread(&one).unwrap(), 0);
    }
}
