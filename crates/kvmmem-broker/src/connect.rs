// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Connects to the tools that hooks name.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::endpoint::{Endpoint, begin};
use kvmmem_sys::socket::peer_credentials;
use rustix::io::Errno;

use crate::hook::Owner;

/// Begins to connect to a tool; whether that is done already. At a unix socket it must be the one
/// of the user who asked for that, or of one who may have the broker do anything: the broker may
/// reach sockets that the user cannot, and what it sends first is partly the target's VMM's to say.
///
/// It waits only for a unix socket's path to be found, which a file system may delay for ever.
pub(crate) fn connect_to_tool(endpoint: &Endpoint, owner: Owner) -> io::Result<(OwnedFd, bool)> {
    let (socket, is_connected) = begin(endpoint)?;
    if let Owner::Host(asker) = owner {
        let listener = peer_credentials(&socket)?;
        let listener = Credentials { pid: listener.pid.unwrap_or(0), uid: listener.uid };
        if listener.uid != asker.uid && !listener.is_administrator() {
            let words = format!(
                "user {} listens there, and user {} asked for the hook; let the tool listen as that user or as root",
                listener.uid, asker.uid
            );
            return Err(io::Error::new(io::ErrorKind::PermissionDenied, words));
        }
    }
    Ok((socket, is_connected))
}

/// Whether a socket is connected by now.
pub(crate) fn is_connected(socket: impl AsFd) -> io::Result<bool> {
    rustix::net::sockopt::socket_error(&socket)??;
    match rustix::net::getpeername(&socket) {
        Ok(_) => Ok(true),
        Err(Errno::NOTCONN) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Read};
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

    use super::*;

    #[test]
    fn nobody_there_is_an_error() {
        assert!(begin(&Endpoint::Unix("/nowhere/at/all".into())).is_err());
        // No VM gets the highest context id but one.
        if let Ok((socket, false)) = begin(&Endpoint::Vsock { cid: u32::MAX - 1, port: 1 }) {
            let limit = Timespec { tv_sec: 60, tv_nsec: 0 };
            poll(&mut [PollFd::new(&socket, PollFlags::OUT)], Some(&limit)).unwrap();
            assert!(is_connected(&socket).is_err());
        }
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
            match begin(&endpoint) {
                Ok(socket) => queued.push(socket),
                Err(error) => break error,
            }
        };
        assert_eq!(full.kind(), io::ErrorKind::WouldBlock);
        assert!(!queued.is_empty());
    }

    /// Not a test of its own: the process of another user in the one below.
    #[test]
    fn listens_where_it_is_told_to() {
        let Some(path) = std::env::var_os(LISTEN) else { return };
        let _listener = std::os::unix::net::UnixListener::bind(path).unwrap();
        println!("listening");
        let _ = std::io::stdin().read(&mut [0]);
    }

    const LISTEN: &str = "KVMMEM_TEST_LISTEN";

    #[test]
    fn what_another_user_listens_at_is_not_written_to() {
        const NOBODY: u32 = 65_534;
        if !rustix::process::geteuid().is_root() {
            eprintln!(
                "skipped: only root can start a process of another user: run the tests as root"
            );
            return;
        }
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o777)).unwrap();
        let path = directory.path().join("tool.sock");
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--nocapture", "--exact", "connect::tests::listens_where_it_is_told_to"]);
        command
            .env(LISTEN, &path)
            .uid(NOBODY)
            .gid(NOBODY)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped());
        let mut listener = match command.spawn() {
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                eprintln!(
                    "skipped: another user cannot run this program: have the target folder where others may go"
                );
                return;
            }
            spawned => spawned.unwrap(),
        };
        let mut lines = BufReader::new(listener.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap().contains("listening")), "it does not listen");
        let endpoint = Endpoint::Unix(path);
        let connect = |uid| connect_to_tool(&endpoint, Owner::Host(Credentials { pid: 1, uid }));
        for asker in [0, 1, NOBODY + 1] {
            let error = connect(asker).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
            assert!(error.to_string().contains("user 65534 listens"), "{error}");
        }
        connect(NOBODY).unwrap();
        drop(listener.stdin.take());
        assert!(listener.wait().unwrap().success());
    }

    #[test]
    fn the_broker_s_own_user_may_listen_for_all() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("tool.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        connect_to_tool(&Endpoint::Unix(path), Owner::Host(Credentials { pid: 1, uid: 65_534 }))
            .unwrap();
    }
}
