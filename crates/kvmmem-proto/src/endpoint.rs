// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a tool listens for KVMI: `vsock:CID:PORT` or `unix:PATH`.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};
use vsock::VsockAddr;

/// The longest path of a unix socket, bytes (`sun_path` less its NUL).
const MAX_PATH: usize = 107;

/// Where a tool listens for KVMI.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub enum Endpoint {
    /// In a VM, or on the host.
    Vsock {
        /// Context id.
        cid: u32,
        /// Port.
        port: u32,
    },
    /// On the host.
    Unix(PathBuf),
}

/// Why a text names no endpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EndpointError {
    /// It starts with neither scheme, or a vsock address has no two numbers.
    #[error("endpoint is neither vsock:CID:PORT nor unix:PATH")]
    Form,
    /// The path is not absolute, too long or holds a control character.
    #[error(
        "endpoint's path must be absolute, at most {MAX_PATH} bytes, without control characters"
    )]
    Path,
}

impl FromStr for Endpoint {
    type Err = EndpointError;

    fn from_str(text: &str) -> Result<Self, EndpointError> {
        if let Some(path) = text.strip_prefix("unix:") {
            let fits = path.len() <= MAX_PATH && !path.chars().any(char::is_control);
            return if fits && Path::new(path).is_absolute() {
                Ok(Self::Unix(path.into()))
            } else {
                Err(EndpointError::Path)
            };
        }
        let (cid, port) = text
            .strip_prefix("vsock:")
            .and_then(|address| address.split_once(':'))
            .ok_or(EndpointError::Form)?;
        match (cid.parse(), port.parse()) {
            (Ok(cid), Ok(port)) => Ok(Self::Vsock { cid, port }),
            _ => Err(EndpointError::Form),
        }
    }
}

impl TryFrom<String> for Endpoint {
    type Error = EndpointError;

    fn try_from(text: String) -> Result<Self, EndpointError> {
        text.parse()
    }
}

impl From<Endpoint> for String {
    fn from(endpoint: Endpoint) -> Self {
        endpoint.to_string()
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock { cid, port } => write!(f, "vsock:{cid}:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// Begins to connect a stream socket to an endpoint; whether that is done already. It waits for
/// nothing but the path of a unix socket to be found. The socket does not block.
///
/// # Errors
/// Those of `socket` and `connect`.
pub fn begin(endpoint: &Endpoint) -> io::Result<(OwnedFd, bool)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    match endpoint {
        Endpoint::Vsock { cid, port } => {
            let socket =
                rustix::net::socket_with(AddressFamily::VSOCK, SocketType::STREAM, flags, None)?;
            match nix::sys::socket::connect(socket.as_raw_fd(), &VsockAddr::new(*cid, *port)) {
                Ok(()) => Ok((socket, true)),
                Err(nix::Error::EINPROGRESS) => Ok((socket, false)),
                Err(error) => Err(error.into()),
            }
        }
        Endpoint::Unix(path) => {
            let address = SocketAddrUnix::new(path)?;
            let socket =
                rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            rustix::net::connect(&socket, &address)?;
            Ok((socket, true))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_read_and_written() {
        for text in ["vsock:3:1234", "vsock:4294967295:0", "unix:/run/tool.sock"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn bad_texts_are_refused() {
        let long = format!("unix:/{}", "x".repeat(107));
        for text in [
            "",
            "tcp:1:2",
            "vsock:3",
            "vsock:3:x",
            "vsock:-1:2",
            "vsock:1:4294967296",
            "unix:",
            "unix:x",
            &long,
        ] {
            assert!(text.parse::<Endpoint>().is_err(), "{text}");
        }
        assert_eq!("unix:/a\nb".parse::<Endpoint>(), Err(EndpointError::Path));
    }
}
