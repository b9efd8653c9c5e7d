// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The unix socket at which clients connect, and the lock beside it: the broker's, and that of
//! `kvmmem proxy` in a guest.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, CWD, FileType, FlockOperation, Gid, Mode, OFlags, chmod, chownat, fstat, openat,
};
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

/// The lock beside a socket, released on drop: also where a child of this process, which has not
/// executed its program yet, still has the file.
#[derive(Debug)]
pub struct SocketLock(File);

impl Drop for SocketLock {
    fn drop(&mut self) {
        // It fails only where there is no lock.
        let _ = rustix::fs::flock(&self.0, FlockOperation::Unlock);
    }
}

/// Listens at `path`, and returns the socket and the lock, to be held as long. The socket is its
/// owner's (mode 0600), or also that of `group` (0660); `accept` does not wait. A socket that was
/// left behind is replaced.
///
/// # Errors
/// [`ListenError`].
pub fn bind(path: &Path, group: Option<u32>) -> Result<(OwnedFd, SocketLock), ListenError> {
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
pub fn lock(path: &Path) -> Result<SocketLock, ListenError> {
    let mut name = path.as_os_str().to_owned();
    name.push(".lock");
    let lock_path = PathBuf::from(name);
    let fail = |source: io::Error| ListenError::Lock { path: lock_path.clone(), source };
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(0o600)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(&lock_path)
        .map_err(fail)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(SocketLock(file)),
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
        admit(path, group)?;
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

/// Gives a socket its group and mode: nothing but a socket, as the folder may be another user's,
/// who puts a link in its place.
fn admit(path: &Path, group: Option<u32>) -> io::Result<()> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let socket = openat(CWD, path, flags, Mode::empty())?;
    if FileType::from_raw_mode(fstat(&socket)?.st_mode) != FileType::Socket {
        return Err(io::Error::other("something else was put in the socket's place"));
    }
    if let Some(group) = group {
        chownat(&socket, "", None, Some(Gid::from_raw(group)), AtFlags::EMPTY_PATH)?;
    }
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    Ok(chmod(format!("/proc/self/fd/{}", socket.as_raw_fd()), Mode::from_raw_mode(mode))?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_socket_is_its_owner_s_or_also_a_group_s() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let group = rustix::process::getegid().as_raw();
        for (group, expected) in [(None, 0o600), (Some(group), 0o660)] {
            let (_listener, _lock) = bind(&path, group).unwrap();
            assert_eq!(mode(&path), expected);
            assert!(matches!(bind(&path, group), Err(ListenError::InUse(_))));
        }
    }

    #[test]
    fn a_lock_is_released_though_a_child_has_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let held = lock(&path).unwrap();
        let _of_a_child = held.0.try_clone().unwrap();
        assert!(matches!(lock(&path), Err(ListenError::InUse(_))));
        drop(held);
        lock(&path).unwrap();
    }

    #[test]
    fn a_link_in_the_place_of_the_socket_or_its_lock_is_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        std::fs::write(at("secret"), "").unwrap();
        std::fs::set_permissions(at("secret"), PermissionsExt::from_mode(0o640)).unwrap();
        symlink(at("secret"), at("put there after bind")).unwrap();
        assert!(admit(&at("put there after bind"), None).is_err());
        assert_eq!(mode(&at("secret")), 0o640);

        symlink(at("made"), at("socket.lock")).unwrap();
        assert!(matches!(bind(&at("socket"), None), Err(ListenError::Lock { .. })));
        assert!(!at("made").exists());
    }
}
