// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Why QEMU gave no answer.

use std::io;
use std::path::PathBuf;

/// Why QEMU gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// No process listens, or the path cannot be looked up.
    #[error("cannot connect to the QMP socket {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The connection was lost before, and there is no new one yet.
    #[error("QEMU's QMP socket {0} does not answer")]
    Down(PathBuf),
    /// There was no answer in time.
    #[error(
        "nothing answers at the QMP socket {0} in time; is another client connected to it? QEMU serves one at a time: ss -xp \
         shows which; end it, or start QEMU with one more socket (-qmp unix:PATH,server=on,wait=off)"
    )]
    Silent(PathBuf),
    /// The connection failed.
    #[error("the connection to the QMP socket {path} failed")]
    Connection {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// More came than QEMU ever says.
    #[error("the QMP socket {0} sends without end")]
    TooMuch(PathBuf),
    /// What came is not QMP, or not the answer.
    #[error("what the QMP socket {path} sends is not the answer to {command}")]
    Garbage {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        command: &'static str,
    },
    /// QEMU knows the question and does not answer it.
    #[error("QEMU refuses {command}: {description}")]
    Refused {
        /// What was asked.
        command: &'static str,
        /// QEMU's words.
        description: String,
    },
}

impl QmpError {
    /// Whether QEMU did answer, if only to refuse: the connection is as good as before.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Refused { .. })
    }

    /// Whether QEMU's words for a refusal contain a text.
    pub fn says(&self, words: &str) -> bool {
        matches!(self, Self::Refused { description, .. } if description.contains(words))
    }
}
