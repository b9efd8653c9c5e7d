// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The broker's own socket, and the lock beside it.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::error::ServerError;

/// Takes the lock beside the socket. The file stays: removing it would let two brokers hold "the"
/// lock.
pub(super) fn lock(path: &Path) -> Result<File, ServerError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock_path = PathBuf::from(name);
    let fail = |source: io::Error| ServerError::Lock { path: lock_path.clone(), source };
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&lock_path)
        .map_err(fail)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(ServerError::InUse(path.to_owned())),
        Err(error) => Err(fail(error.into())),
    }
}

/// A socket that listens at `path`. Only its owner can connect before it has its final mode.
pub(super) fn listener(path: &Path, group: Option<u32>) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let listener =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    rustix::net::bind(&listener, &address)?;
    let ready = || -> io::Result<()> {
        // Peers can connect from `listen` on, and the mode is in force by then.
        if let Some(group) = group {
            std::os::unix::fs::chown(path, None, Some(group))?;
        }
        let mode = if group.is_some() { 0o660 } else { 0o600 };
        std::fs::set_permissions(path, Permissions::from_mode(mode))?;
        Ok(rustix::net::listen(listener.as_fd(), 64)?)
    };
    match ready() {
        Ok(()) => Ok(listener),
        Err(error) => {
            // The path was free when it was bound, so what is there is ours.
            let _ = std::fs::remove_file(path);
            Err(error)
        }
    }
}
