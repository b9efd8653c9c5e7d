// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A socket.

use std::net::SocketAddr;

/// What a socket speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// UDP-Lite, which 7.1 removed.
    UdpLite,
    /// Raw IP.
    Raw,
    /// Unix domain.
    Unix,
}

/// What a socket's connection is doing (`include/net/tcp_states.h`); other protocols than TCP use
/// some of these.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It has a peer.
    Established,
    /// It waits for the answer to its first packet.
    SynSent,
    /// It waits for the last packet of the handshake.
    SynReceived,
    /// It was closed here, and the peer has not confirmed that.
    FinWait1,
    /// It was closed here.
    FinWait2,
    /// It was closed at both ends, and late packets may come.
    TimeWait,
    /// It has no peer.
    Unconnected,
    /// It was closed by the peer.
    CloseWait,
    /// It was closed by the peer, then here.
    LastAck,
    /// It accepts connections.
    Listen,
    /// It was closed at both ends at once.
    Closing,
}

/// The kind of a unix socket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes.
    Stream,
    /// Packets, without a connection.
    Datagram,
    /// Packets, with one.
    SeqPacket,
}

/// The two ends of a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ends {
    /// Of an internet socket. Port 0 and the address 0 mean none; the local port of a raw socket is
    /// its protocol's number.
    Inet {
        /// Here.
        local: SocketAddr,
        /// There.
        peer: SocketAddr,
    },
    /// Of a unix socket.
    Unix {
        /// Its kind.
        kind: Kind,
        /// The name that it is bound to; one without a file begins with @. Bytes that are not UTF-8
        /// are replaced; control characters are kept.
        path: Option<String>,
        /// The inode of the socket it is connected to, 0 for one that was not accepted yet.
        peer: Option<u64>,
    },
}

/// A socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Socket {
    /// Where its `struct sock` is.
    pub gva: u64,
    /// What it speaks.
    pub protocol: Protocol,
    /// What its connection is doing.
    pub state: State,
    /// Its ends.
    pub ends: Ends,
    /// The inode of its file; 0 where it has none: one that was not accepted yet, or whose process
    /// has closed it.
    pub inode: u64,
    /// The user who made it; `None` for a connection that has only its addresses (`TimeWait`,
    /// `SynReceived`).
    pub uid: Option<u32>,
    /// The inode of its network namespace, as in /proc/PID/ns/net; `None` where it cannot be read.
    pub netns: Option<u32>,
    /// Whether it changed during every read, so that its values may not belong together.
    pub is_torn: bool,
    /// Whether some of it cannot be read: what it is bound to, its inode and user, or its
    /// namespace.
    pub is_damaged: bool,
}

impl Socket {
    /// Its protocol as /proc/net names it: `tcp`, `tcp6`, `udp` and so on.
    pub fn protocol_name(&self) -> &'static str {
        let is_v6 = matches!(self.ends, Ends::Inet { local: SocketAddr::V6(_), .. });
        match (self.protocol, is_v6) {
            (Protocol::Tcp, false) => "tcp",
            (Protocol::Tcp, true) => "tcp6",
            (Protocol::Udp, false) => "udp",
            (Protocol::Udp, true) => "udp6",
            (Protocol::UdpLite, false) => "udplite",
            (Protocol::UdpLite, true) => "udplite6",
            (Protocol::Raw, false) => "raw",
            (Protocol::Raw, true) => "raw6",
            (Protocol::Unix, _) => "unix",
        }
    }
}

impl State {
    /// From the kernel's number.
    pub(super) fn of(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Established,
            2 => Self::SynSent,
            // The second has only been in the kernel's tables, never in /proc.
            3 | 12 => Self::SynReceived,
            4 => Self::FinWait1,
            5 => Self::FinWait2,
            6 => Self::TimeWait,
            7 => Self::Unconnected,
            8 => Self::CloseWait,
            9 => Self::LastAck,
            10 => Self::Listen,
            11 => Self::Closing,
            _ => return None,
        })
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Established => "established",
            Self::SynSent => "syn-sent",
            Self::SynReceived => "syn-recv",
            Self::FinWait1 => "fin-wait-1",
            Self::FinWait2 => "fin-wait-2",
            Self::TimeWait => "time-wait",
            Self::Unconnected => "unconnected",
            Self::CloseWait => "close-wait",
            Self::LastAck => "last-ack",
            Self::Listen => "listen",
            Self::Closing => "closing",
        }
    }
}
