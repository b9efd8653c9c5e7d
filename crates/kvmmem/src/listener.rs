// SPDX-License-Identifier: Apache-2.0 OR MIT
//! KVMI listener: a tool waits for the broker to connect, once for each hooked VM.
//!
//! [`Listener::accept`] does the handshake and returns a [`Session`].

use std::fmt;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vsock::{VMADDR_CID_ANY, VMADDR_CID_HOST, VsockListener};

use crate::session::{Session, SessionError};
use crate::stream::Stream;

/// Where a tool listens; written `vsock:PORT` or `unix:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// A vsock port of this virtual machine; the host connects to it.
    Vsock(u32),
    /// A unix socket, for a tool on the host itself.
    Unix(PathBuf),
}

/// Why a tool cannot listen, or no VM connected.
#[derive(Debug, thiserror::Error)]
pub enum ListenerError {
    /// The endpoint's text is neither form.
    #[error(
        "{text:?} is not an endpoint: write vsock:PORT (a number up to 0xfffffffe) or unix:PATH"
    )]
    Endpoint {
        /// What was given.
        text: String,
    },
    /// The socket could not be made, or another process has it.
    #[error("cannot listen on {endpoint}{remedy}")]
    Bind {
        /// Where.
        endpoint: Endpoint,
        /// What to do about it, where that is known.
        remedy: &'static str,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// Waiting failed.
    #[error("cannot accept a connection on {endpoint}")]
    Accept {
        /// Where.
        endpoint: Endpoint,
        /// The system's answer.
        #[source]
        source: io::Error,
    },
    /// No VM connected in time.
    #[error(
        "no target connected to {endpoint} within {} s: is a target hooked to it (on the host: kvmmem hook add)?",
        limit.as_secs_f32()
    )]
    Timeout {
        /// Where.
        endpoint: Endpoint,
        /// How long was waited.
        limit: Duration,
    },
    /// A peer connected, but the session could not be started; [`Listener::accept`] can be called
    /// again.
    #[error("the session on {endpoint} could not be started")]
    Session {
        /// Where.
        endpoint: Endpoint,
        /// What went wrong.
        #[source]
        source: SessionError,
    },
}

/// A listening socket. A unix socket's file is removed on drop.
#[derive(Debug)]
pub struct Listener {
    socket: Socket,
    endpoint: Endpoint,
}

#[derive(Debug)]
enum Socket {
    Unix(UnixListener),
    Vsock(VsockListener),
}

impl FromStr for Endpoint {
    type Err = ListenerError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let endpoint = match text.split_once(':') {
            Some(("vsock", port)) => {
                port.parse().ok().filter(|port| *port != u32::MAX).map(Self::Vsock)
            }
            Some(("unix", path)) if !path.is_empty() => Some(Self::Unix(path.into())),
            _ => None,
        };
        endpoint.ok_or_else(|| ListenerError::Endpoint { text: text.to_owned() })
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vsock(port) => write!(f, "vsock:{port}"),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Listener {
    /// Binds the socket and listens. The umask decides who may connect to a unix socket.
    ///
    /// ```no_run
    /// let listener = kvmmem::Listener::bind(&"vsock:1234".parse()?)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`ListenerError::Bind`].
    pub fn bind(endpoint: &Endpoint) -> Result<Self, ListenerError> {
        let socket = match endpoint {
            Endpoint::Vsock(port) => bind_vsock(*port),
            Endpoint::Unix(path) => UnixListener::bind(path).and_then(|listener| {
                listener.set_nonblocking(true).map(|()| Socket::Unix(listener))
            }),
        };
        let socket = socket.map_err(|source| ListenerError::Bind {
            endpoint: endpoint.clone(),
            remedy: bind_remedy(endpoint, source.kind()),
            source,
        })?;
        Ok(Self { socket, endpoint: endpoint.clone() })
    }

    /// Waits for the next VM and does the handshake.
    ///
    /// On vsock only the host's connections are accepted: another process of this VM cannot pose
    /// as a target.
    ///
    /// ```no_run
    /// # fn example(listener: &kvmmem::Listener) -> Result<(), kvmmem::ListenerError> {
    /// let target = listener.accept(std::time::Duration::from_secs(30))?;
    /// println!("{:?} has connected", target.name());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ListenerError::Timeout`], [`ListenerError::Session`] if the handshake fails,
    /// [`ListenerError::Accept`].
    pub fn accept(&self, timeout: Duration) -> Result<Session, ListenerError> {
        let start = Instant::now();
        let mut is_first = true;
        loop {
            let left = timeout.saturating_sub(start.elapsed());
            // Others than the host may connect again and again.
            let is_late = left.is_zero() && !std::mem::take(&mut is_first);
            if is_late || !self.wait(left).map_err(|source| self.failed(source))? {
                return Err(ListenerError::Timeout {
                    endpoint: self.endpoint.clone(),
                    limit: timeout,
                });
            }
            match self.accept_now() {
                Ok(Some(stream)) => {
                    return Session::start(stream).map_err(|source| ListenerError::Session {
                        endpoint: self.endpoint.clone(),
                        source,
                    });
                }
                Ok(None) => {}
                Err(error) if is_passing(&error) => {}
                Err(source) => return Err(self.failed(source)),
            }
        }
    }

    /// Whether a connection is there within `limit`.
    fn wait(&self, limit: Duration) -> io::Result<bool> {
        let fd = match &self.socket {
            Socket::Unix(listener) => listener.as_fd(),
            Socket::Vsock(listener) => listener.as_fd(),
        };
        let limit = Timespec::try_from(limit).map_err(|_| io::ErrorKind::InvalidInput)?;
        match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&limit)) {
            Ok(ready) => Ok(ready != 0),
            // The caller's loop comes back with what is left of the time.
            Err(rustix::io::Errno::INTR) => Ok(true),
            Err(error) => Err(error.into()),
        }
    }

    /// Takes the connection that is there; `None` where it is not the host's.
    fn accept_now(&self) -> io::Result<Option<Stream>> {
        match &self.socket {
            Socket::Unix(listener) => Ok(Some(Stream::Unix(listener.accept()?.0))),
            Socket::Vsock(listener) => {
                let (stream, peer) = listener.accept()?;
                if peer.cid() != VMADDR_CID_HOST {
                    tracing::warn!(cid = peer.cid(), "refused a connection that is not the host's");
                    return Ok(None);
                }
                Ok(Some(Stream::Vsock(stream)))
            }
        }
    }

    fn failed(&self, source: io::Error) -> ListenerError {
        ListenerError::Accept { endpoint: self.endpoint.clone(), source }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Endpoint::Unix(path) = &self.endpoint {
            // The file may have been removed already.
            let _ = std::fs::remove_file(path);
        }
    }
}

fn bind_vsock(port: u32) -> io::Result<Socket> {
    let listener = VsockListener::bind_with_cid_port(VMADDR_CID_ANY, port)?;
    listener.set_nonblocking(true)?;
    Ok(Socket::Vsock(listener))
}

/// Errors of `accept` that concern the one connection only.
fn is_passing(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted
    )
}

fn bind_remedy(endpoint: &Endpoint, kind: io::ErrorKind) -> &'static str {
    match (endpoint, kind) {
        (Endpoint::Unix(_), io::ErrorKind::AddrInUse) => {
            ": the file exists; remove it if no other tool listens there"
        }
        (Endpoint::Vsock(_), io::ErrorKind::AddrInUse) => {
            ": another process listens there; choose another port"
        }
        (Endpoint::Vsock(_), io::ErrorKind::PermissionDenied) => ": ports below 1024 are for root",
        (Endpoint::Vsock(_), _) => {
            ": does this VM have a vsock device (vmw_vsock_virtio_transport)?"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints_round_trip() {
        for text in ["vsock:1234", "vsock:0", "unix:/run/x.sock", "unix:a:b"] {
            assert_eq!(text.parse::<Endpoint>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_texts_are_refused_by_name() {
        for text in [
            "",
            "vsock",
            "vsock:",
            "vsock:-1",
            "vsock:4294967295",
            "vsock:3:4",
            "unix:",
            "tcp:1",
            "1234",
        ] {
            let error = text.parse::<Endpoint>().unwrap_err().to_string();
            assert!(
                error.contains(&format!("{text:?}")) && error.contains("vsock:PORT"),
                "{error}"
            );
        }
    }
}
