// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why the broker cannot serve.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;

/// Why the broker cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// Another broker has the socket.
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
    /// The broker cannot serve the socket that was passed.
    #[error("cannot serve the socket that was passed")]
    Adopt(#[source] io::Error),
    /// Waiting for peers failed.
    #[error("cannot wait for connections")]
    Wait(#[source] Errno),
}
