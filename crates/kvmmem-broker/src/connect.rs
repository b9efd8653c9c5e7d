// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connects to a tool.

use std::io;
use std::os::fd::OwnedFd;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vsock::VsockStream;

use crate::endpoint::Endpoint;

/// Connects a stream socket to a tool's endpoint.
///
/// Waits for no more than the 2 s that the kernel gives a vsock connection (`SO_VM_SOCKETS_CONNECT_TIMEOUT`), and not
/// at all for a unix socket, whose queue is either full or not.
///
/// # Errors
/// Those of `socket` and `connect`.
pub(crate) fn connect(endpoint: &Endpoint) -> io::Result<OwnedFd> {
    match endpoint {
        Endpoint::Vsock { cid, port } => Ok(VsockStream::connect_with_cid_port(*cid, *port)?.into()),
        Endpoint::Unix(path) => {
            let address = SocketAddrUnix::new(path)?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            rustix::net::connect(&socket, &address)?;
            rustix::io::ioctl_fionbio(&socket, false)?;
            Ok(socket)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use super::*;

    #[test]
    fn nobody_there_is_an_error_soon() {
        let began = Instant::now();
        // No VM gets the highest context id but one.
        assert!(connect(&Endpoint::Vsock { cid: u32::MAX - 1, port: 1 }).is_err());
        assert!(connect(&Endpoint::Unix("/nowhere/at/all".into())).is_err());
        assert!(began.elapsed() < Duration::from_secs(4));
    }

    #[test]
    fn a_tool_that_does_not_accept_is_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tool.sock");
        let listener = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        let endpoint = Endpoint::Unix(path);
        let mut queued = Vec::new();
        let full = loop {
            match connect(&endpoint) {
                Ok(socket) => queued.push(socket),
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        assert!(!queued.is_empty());
    }
}
