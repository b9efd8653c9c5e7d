// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A broker on a socket that somebody else, the service manager, has made and keeps.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketType, sockopt};

use super::{Server, ServerError, Shared, lock};
use crate::core::limits::Limits;

/// Permission bits of everybody but the owner.
const OTHERS: u32 = 0o077;

impl Server {
    /// Serves a listening socket. Whoever made it has set who may connect, and removes it; this
    /// broker only takes the lock beside it.
    ///
    /// # Errors
    /// [`ServerError::Adopt`] where it is no unix socket of sequenced packets with a path;
    /// [`ServerError::InUse`], [`ServerError::Lock`].
    pub fn from_activation(listener: OwnedFd) -> Result<Self, ServerError> {
        let (path, mode) = inspect(&listener).map_err(ServerError::Adopt)?;
        let lock = lock(&path)?;
        let group = mode & OTHERS != 0;
        Ok(Self {
            path,
            listener,
            _lock: lock,
            group,
            is_activated: true,
            shared: Arc::new(Shared::new(Limits::default())),
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &std::path::Path {
        &self.path
    }
}

/// The socket's path and mode.
fn inspect(listener: &OwnedFd) -> io::Result<(PathBuf, u32)> {
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
