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
mod socket;
mod tables;

use std::collections::{HashSet, VecDeque};

use crate::kernel::{Kernel, KernelError};
use layout::{Layout, TRIES};
pub use socket::{Ends, Kind, Protocol, Socket, State};
use tables::{Bucket, Buckets};

/// The most sockets of a guest that are listed.
const MAX_SOCKETS: usize = 1 << 20;

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
    /// Address of the kernel's count of unix sockets, until one is found.
    unix_count: Option<u64>,
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
        let unix_count = kernel.symbol_or_of_module("unix_nr_socks", "unix").ok().flatten();
        Ok(Self { kernel, layout, buckets, found, seen, left, unix_count, has_ended: false })
    }

    fn step(&mut self) -> Result<Option<Socket>, KernelError> {
        loop {
            if let Some(socket) = self.found.pop_front() {
                return socket.map(Some);
            }
            match self.buckets.next().transpose()? {
                Some(bucket) => self.found = self.bucket(&bucket)?.into(),
                None => return self.check_unix().map(|()| None),
            }
        }
    }

    /// An error if the kernel counts unix sockets and none was found: a table of zeros looks empty.
    fn check_unix(&mut self) -> Result<(), KernelError> {
        let Some(gva) = self.unix_count.take() else { return Ok(()) };
        if matches!(self.kernel.read_u64(gva), Ok(0) | Err(_)) {
            return Ok(());
        }
        let what = "the table of unix sockets, which has none while the kernel counts some,";
        Err(KernelError::Malformed { what: what.to_owned(), gva })
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
                if bucket.protocol == Protocol::Unix {
                    self.unix_count = None;
                }
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
