// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why the broker cannot serve.

use std::io;

use kvmmem_proto::listener::ListenError;
use rustix::io::Errno;

/// Why the broker cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ServerError {
    /// There is no socket to listen at.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The broker cannot serve the socket that was passed.
    #[error("cannot serve the socket that was passed")]
    Activation(#[source] io::Error),
    /// Waiting for peers failed.
    #[error("cannot wait for connections")]
    Wait(#[source] Errno),
}
