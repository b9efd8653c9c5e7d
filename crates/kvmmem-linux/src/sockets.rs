// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sockets of all network namespaces, as /proc/net/{tcp,tcp6,udp,udp6,raw,raw6,unix} show those of
//! one.
//!
//! Each protocol has hash tables of its own (`tables`); a socket is in one chain of one table.
//! The guest adds and removes sockets while they are read, and the kernel reuses their memory at
//! once: a chain that ends in another bucket is walked again, and a socket that changes while it is
//! read is marked as torn. What is damaged is an error in its place; the rest of the tables is
//! read.

mod layout;
mod tables;

use std::collections::{HashSet, VecDeque};
use std::net::SocketAddr;

use crate::kernel::{Kernel, KernelError};
use layout::Layout;
use tables::{Bucket, Buckets};

/// The most sockets of a guest that are listed.
const MAX_SOCKETS: usize = 1 << 20;

/// Walks of a chain, and reads of a socket, that changes.
const TRIES: u32 = 3;

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
    fn of(number: u8) -> Option<Self> {
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

/// The sockets, table by table. An error stands for sockets that cannot be read: a walk without an
/// error is complete.
#[derive(Debug)]
pub struct Sockets<'a> {
    kernel: &'a Kernel<'a>,
    layout: Layout,
    buckets: Buckets<'a>,
    /// Those of the last bucket that are left.
    found: VecDeque<Result<Socket, KernelError>>,
    /// The kernel may reuse a socket's memory for one in a later chain.
    seen: HashSet<u64>,
    /// Nodes of chains that may still be walked.
    left: usize,
    has_ended: bool,
}

impl<'a> Sockets<'a> {
    /// The sockets of a kernel.
    ///
    /// # Errors
    /// [`KernelError`].
    pub fn new(kernel: &'a Kernel<'a>) -> Result<Self, KernelError> {
        let layout = Layout::new(kernel)?;
        let (tables, lost) = tables::all(kernel, &layout)?;
        let buckets = Buckets::new(kernel, tables);
        let found = lost.into_iter().map(Err).collect();
        let (seen, left) = (HashSet::new(), MAX_SOCKETS);
        Ok(Self { kernel, layout, buckets, found, seen, left, has_ended: false })
    }

    fn step(&mut self) -> Result<Option<Socket>, KernelError> {
        loop {
            if let Some(socket) = self.found.pop_front() {
                return socket.map(Some);
            }
            let Some(bucket) = self.buckets.next().transpose()? else { return Ok(None) };
            self.found = self.bucket(&bucket)?.into();
        }
    }

    /// The sockets of a bucket, as far as its chain can be followed.
    fn bucket(&mut self, bucket: &Bucket) -> Result<Vec<Result<Socket, KernelError>>, KernelError> {
        let (mut nodes, mut end) = self.nodes(bucket, bucket.first)?;
        for _ in 1..TRIES {
            if end.is_none() {
                break;
            }
            (nodes, end) = self.nodes(bucket, self.kernel.read_u64(bucket.head)?)?;
        }
        let mut found = Vec::new();
        for gva in nodes {
            if self.seen.insert(gva) {
                found.push(self.layout.socket(self.kernel, gva, bucket.protocol));
            }
        }
        // A socket that cannot be read ends its chain.
        found.extend(end.filter(|_| !matches!(found.last(), Some(Err(_)))).map(Err));
        Ok(found)
    }

    /// The sockets of a chain, and why there are not more if it does not end in its bucket.
    fn nodes(
        &mut self,
        bucket: &Bucket,
        first: u64,
    ) -> Result<(Vec<u64>, Option<KernelError>), KernelError> {
        let mut chain = self.kernel.chain(bucket.head, first);
        let mut nodes = Vec::new();
        for node in &mut chain {
            let left = self.left.checked_sub(1);
            self.left = left.ok_or(KernelError::TooMuch { what: "a million sockets" })?;
            match node {
                Ok(node) => nodes.push(node.wrapping_sub(bucket.node)),
                Err(error) => return Ok((nodes, Some(error))),
            }
        }
        let is_end = chain.nulls().is_some() == bucket.is_marked
            && (bucket.nulls.is_none() || chain.nulls() == bucket.nulls);
        let what = || "the end of the chain of sockets".to_owned();
        Ok((nodes, (!is_end).then(|| KernelError::Malformed { what: what(), gva: bucket.head })))
    }
}

impl Iterator for Sockets<'_> {
    type Item = Result<Socket, KernelError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.has_ended {
            return None;
        }
        let step = self.step().transpose();
        self.has_ended =
            step.as_ref().is_none_or(|step| step.as_ref().is_err_and(|error| !error.is_local()));
        step
    }
}
