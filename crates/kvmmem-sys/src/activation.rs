// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Socket activation: listening sockets that the service manager passes (sd_listen_fds(3)).

use std::ffi::OsString;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd, RawFd};

use rustix::io::FdFlags;

/// The first descriptor that a service manager passes (`SD_LISTEN_FDS_START`).
const FIRST: RawFd = 3;

/// The most sockets that are taken.
const MOST: RawFd = 16;

/// Why sockets that were passed cannot be taken.
#[derive(Debug, thiserror::Error)]
pub enum ActivationError {
    /// `LISTEN_FDS` is not a number from 0 to 16.
    #[error("LISTEN_FDS is {0:?}, not a number from 0 to {MOST}")]
    Count(OsString),
    /// A descriptor that `LISTEN_FDS` counts is not one.
    #[error("descriptor {number}, one of {count} that LISTEN_FDS promises, cannot be taken")]
    Take {
        /// The descriptor.
        number: RawFd,
        /// `LISTEN_FDS`.
        count: RawFd,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A descriptor is not a listening socket.
    #[error("descriptor {0}, passed by LISTEN_FDS, is not a listening socket")]
    NotListening(RawFd),
}

/// The listening sockets that were passed; none where `LISTEN_PID` is not this process.
///
/// They are duplicates that `exec` closes, and the originals are set to be closed by it too.
///
/// # Errors
/// [`ActivationError`].
pub fn passed_listeners() -> Result<Vec<OwnedFd>, ActivationError> {
    let own = std::process::id().to_string();
    if std::env::var_os("LISTEN_PID").is_none_or(|pid| pid != own.as_str()) {
        return Ok(Vec::new());
    }
    let count = count(std::env::var_os("LISTEN_FDS"))?;
    (FIRST..FIRST + count).map(|number| take(number, count)).collect()
}

fn count(text: Option<OsString>) -> Result<RawFd, ActivationError> {
    let Some(text) = text else { return Ok(0) };
    let number = text.to_str().and_then(|text| text.parse().ok());
    number.filter(|number| (0..=MOST).contains(number)).ok_or(ActivationError::Count(text))
}

fn take(number: RawFd, count: RawFd) -> Result<OwnedFd, ActivationError> {
    let fail = |source: io::Error| ActivationError::Take { number, count, source };
    // SAFETY:
    // 1. `number` is from 3 to 18, so not -1, which a borrowed descriptor must not be.
    // 2. It has to stay open as long as it is borrowed, which ends with this function. By the
    //    protocol it was open when the process began and belongs to the caller; no other code in
    //    the process knows of it and could close it. It is never closed here either: what the
    //    caller owns is a duplicate.
    // 3. Should the environment lie, nothing that others own is closed or read: a number that is
    //    not open makes both calls below fail with EBADF, and a file that is not a listening
    //    socket is refused.
    let passed = unsafe { BorrowedFd::borrow_raw(number) };
    let is_listening = rustix::net::sockopt::socket_acceptconn(passed);
    if !is_listening.map_err(|error| fail(error.into()))? {
        return Err(ActivationError::NotListening(number));
    }
    rustix::io::fcntl_setfd(passed, FdFlags::CLOEXEC).map_err(|error| fail(error.into()))?;
    passed.try_clone_to_owned().map_err(fail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_are_read() {
        for (text, expected) in [("0", 0), ("1", 1), ("16", 16)] {
            assert_eq!(count(Some(text.into())).unwrap(), expected);
        }
        assert_eq!(count(None).unwrap(), 0);
        for bad in ["", "x", "-1", "17", "99999999999", "1 "] {
            assert!(count(Some(bad.into())).is_err(), "{bad}");
        }
    }

    #[test]
    fn without_a_service_manager_there_are_none() {
        // The tests' environment has no LISTEN_PID that is this process.
        assert!(passed_listeners().unwrap().is_empty());
    }

    #[test]
    fn what_is_no_listening_socket_is_refused() {
        assert!(matches!(take(1000, 1), Err(ActivationError::Take { number: 1000, .. })));
        let file = std::fs::File::open("/dev/null").unwrap();
        assert!(take(std::os::fd::AsRawFd::as_raw_fd(&file), 1).is_err());
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&one);
        assert!(matches!(take(number, 1), Err(ActivationError::NotListening(_))));
    }
}
