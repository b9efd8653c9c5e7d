// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Socket activation: the service manager makes the socket and removes it.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, sockopt};

/// The path and the mode of a listening socket that was passed.
///
/// # Errors
/// Where it is not a unix socket of type SOCK_SEQPACKET with a path.
pub(super) fn inspect(listener: &OwnedFd) -> io::Result<(PathBuf, u32)> {
    let fits = sockopt::socket_domain(listener)? == AddressFamily::UNIX
        && sockopt::socket_type(listener)? == SocketType::SEQPACKET;
    if !fits {
        return Err(io::Error::other("it is not a unix socket of type SOCK_SEQPACKET"));
    }
    let address = SocketAddrUnix::try_from(rustix::net::getsockname(listener)?)?;
    let path = address.path().ok_or_else(|| io::Error::other("it has no path"))?;
    let path = PathBuf::from(path.to_string_lossy().into_owned());
    let mode = std::fs::symlink_metadata(&path)?.mode();
    // A peer that is gone before it is accepted must not be waited for.
    rustix::io::ioctl_fionbio(listener, true)?;
    Ok((path, mode))
}
