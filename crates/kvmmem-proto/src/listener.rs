// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The unix socket at which clients connect, and the lock beside it: the broker's, and that of
//! `kvmmem proxy` in a guest.

use std::fs::{File, OpenOptions, Permissions};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Why a process cannot listen.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// Another process has the socket.
    #[error("another broker serves {0}")]
    InUse(PathBuf),
    /// The path is taken by something else than a socket.
    #[error("{0} exists and is not a socket")]
    NotASocket(PathBuf),
    /// The lock file beside the socket cannot be taken.
    #[error("cannot lock {path}")]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The socket cannot be made.
    #[error("cannot listen at {path}")]
    Listen {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Listens at `path`, and returns the socket and the lock, to be held as long. The socket is its
/// owner's (mode 0600), or also that of `group` (0660); `accept` does not wait. A socket that was
/// left behind is replaced.
///
/// # Errors
/// [`ListenError`].
pub fn bind(path: &Path, group: Option<u32>) -> Result<(OwnedFd, File), ListenError> {
    let lock = lock(path)?;
    let fail = |source: io::Error| ListenError::Listen { path: path.to_owned(), source };
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(ListenError::NotASocket(path.to_owned()));
        }
        Ok(_) => std::fs::remove_file(path).map_err(fail)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(error)),
    }
    Ok((listener(path, group).map_err(fail)?, lock))
}

/// Takes the lock beside a socket. The file stays: removing it would let two processes hold "the"
/// lock.
///
/// # Errors
/// [`ListenError::InUse`], [`ListenError::Lock`].
pub fn lock(path: &Path) -> Result<File, ListenError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock_path = PathBuf::from(name);
    let fail = |source: io::Error| ListenError::Lock { path: lock_path.clone(), source };
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .open(&lock_path)
        .map_err(fail)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::WOULDBLOCK) => Err(ListenError::InUse(path.to_owned())),
        Err(error) => Err(fail(error.into())),
    }
}

/// A socket that listens at `path`. Only its owner can connect before it has its final mode.
fn listener(path: &Path, group: Option<u32>) -> io::Result<OwnedFd> {
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
