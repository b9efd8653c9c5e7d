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
