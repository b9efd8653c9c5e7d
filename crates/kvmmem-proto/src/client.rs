// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client's end of a connection to the broker: connecting, one request and its answer, and
//! why either fails. Operators, VMMs and processes of the host use it alike.

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::io::Errno;

use crate::map::MapError;
use crate::message::{Answer, FromBroker, Refusal, Request};
use crate::packet::{LossyPacket, PacketBuffer, PacketError, PacketSocket, Wait};

/// Where the broker listens by default.
pub const DEFAULT_SOCKET: &str = "/run/kvmmem/kvmmemd.sock";

/// How long the broker may take to answer, or to take a packet.
pub const LIMIT: Duration = Duration::from_secs(5);

/// Why the broker did not do what was asked, or a connection to it ended.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The broker cannot be reached.
    #[error("cannot reach the broker at {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: PacketError,
    },
    /// The connection failed.
    #[error("connection to the broker failed")]
    Packet(#[from] PacketError),
    /// The broker closed the connection, or answered another question.
    #[error("the broker gave no answer")]
    NoAnswer,
    /// The broker did not answer in time.
    #[error("the broker has not answered in time; its log says more")]
    Silent,
    /// The broker refused.
    #[error("{message}")]
    Refused {
        /// Which kind of failure; [`Refusal::Unknown`] for a token that is unknown, used, expired
        /// or for another holder.
        refusal: Refusal,
        /// The broker's words.
        message: String,
    },
    /// The broker sent a memory map that is not possible.
    #[error("the broker sent an invalid memory map")]
    Map(#[source] MapError),
    /// The broker sent fewer files than the memory map names.
    #[error("the broker sent {found} of the {needed} files with the target's RAM")]
    Files {
        /// How many came.
        found: usize,
        /// How many there must be.
        needed: usize,
    },
    /// This process lacks what the connection takes.
    #[error("cannot {what} for the connection to the broker")]
    Local {
        /// What cannot be done.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The view has ended, as an event has told.
    #[error("the view has ended")]
    Ended,
}

/// Connects to the broker that listens at `path`. No send and no receive waits longer than
/// [`LIMIT`].
///
/// # Errors
/// [`ClientError::Connect`].
pub fn connect(path: &Path) -> Result<PacketSocket, ClientError> {
    let connect = || {
        let socket = PacketSocket::connect(path, LIMIT)?;
        socket.limit_receive(Some(LIMIT))?;
        Ok(socket)
    };
    connect().map_err(|source| ClientError::Connect { path: path.to_owned(), source })
}

/// Sends a request with `files` beside it and returns its answer with those that came: `None` where
/// this process has no descriptors left for them. What the broker pushes before the answer goes to
/// `push`.
///
/// # Errors
/// [`ClientError::Packet`], [`ClientError::NoAnswer`], [`ClientError::Refused`],
/// [`ClientError::Silent`].
pub fn ask(
    socket: &PacketSocket,
    buffer: &mut PacketBuffer,
    request: &Request,
    files: &[BorrowedFd<'_>],
    mut push: impl FnMut(FromBroker),
) -> Result<LossyPacket<Answer>, ClientError> {
    // A broker that is full says so, with number 0, and closes, perhaps before this is sent.
    let sent = socket.send(request, files, Wait::Limited);
    let is_mine = |id: u64| id == request.id || id == 0;
    loop {
        let received = socket.receive_lossy(buffer).map_err(|error| match error {
            PacketError::Receive(Errno::AGAIN) => ClientError::Silent,
            error => error.into(),
        });
        match received? {
            Some((FromBroker::Answer { id, answer }, files)) if id == request.id => {
                return Ok((answer, files));
            }
            Some((FromBroker::Refused { id, refusal, message }, _)) if is_mine(id) => {
                return Err(ClientError::Refused { refusal, message });
            }
            Some((message, _)) => push(message),
            None => return Err(sent.err().map_or(ClientError::NoAnswer, ClientError::Packet)),
        }
    }
}

#[cfg(test)]
mod tests {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};

    use super::*;
    use crate::message::Call;

    /// Asks request 7 of a broker that has sent these messages, and closed.
    fn asked(messages: &[FromBroker]) -> (Result<Answer, ClientError>, usize) {
        let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let (client, broker) = socketpair(family, kind, SocketFlags::CLOEXEC, None).unwrap();
        let [client, broker] =
            [client, broker].map(|fd| PacketSocket::accepted(fd, LIMIT).unwrap());
        for message in messages {
            broker.send(message, &[], Wait::Limited).unwrap();
        }
        drop(broker);
        let request = Request { id: 7, call: Call::Targets { after: 0 } };
        let mut pushed = 0;
        let answer = ask(&client, &mut PacketBuffer::default(), &request, &[], |_| pushed += 1);
        (answer.map(|(answer, _)| answer), pushed)
    }

    #[test]
    fn an_answer_is_told_from_what_comes_before_it() {
        let refused = |id| FromBroker::Refused {
            id,
            refusal: Refusal::Limit,
            message: "too many".to_owned(),
        };
        let done = |id| FromBroker::Answer { id, answer: Answer::Done };
        let pushed = FromBroker::Gone { target: 3 };
        assert!(matches!(asked(&[pushed, done(6), done(7)]), (Ok(Answer::Done), 2)));
        assert!(matches!(asked(&[refused(6), done(7)]), (Ok(Answer::Done), 1)));
        for id in [0, 7] {
            let (answer, _) = asked(&[refused(id)]);
            assert!(
                matches!(&answer, Err(ClientError::Refused { refusal: Refusal::Limit, message }) if message == "too many"),
                "{answer:?}"
            );
        }
        // It was closed before the request was sent.
        assert!(matches!(asked(&[]), (Err(ClientError::Packet(PacketError::Send(_))), 0)));
    }

    #[test]
    fn a_broker_that_does_not_answer_in_time_is_told_as_such() {
        let (family, kind) = (AddressFamily::UNIX, SocketType::SEQPACKET);
        let (client, _broker) = socketpair(family, kind, SocketFlags::CLOEXEC, None).unwrap();
        let client = PacketSocket::accepted(client, LIMIT).unwrap();
        client.limit_receive(Some(Duration::from_millis(1))).unwrap();
        let request = Request { id: 7, call: Call::Targets { after: 0 } };
        let answer = ask(&client, &mut PacketBuffer::default(), &request, &[], |_| {});
        let error = answer.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("the broker has not answered"), "{error}");
    }
}
