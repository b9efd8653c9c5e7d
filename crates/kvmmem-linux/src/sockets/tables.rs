// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The hash tables that sockets are in: one of TCP for connections and one for listeners, one of UDP, one of raw sockets for each
//! version of IP, one of unix sockets. Since 6.0 a network namespace can have its own of TCP, since 6.2 of UDP; unix sockets
//! have one in each namespace since 6.0.

use std::collections::BTreeSet;

use super::Protocol;
use super::layout::Layout;
use crate::kernel::{Kernel, KernelError};

/// The most network namespaces.
const MAX_NETS: usize = 1 << 16;

/// The most buckets of all tables together: 128 MiB of them.
const MAX_BUCKETS: u64 = 1 << 24;

/// Buckets that are read at once.
const BATCH: u64 = 512;

/// Buckets of the tables whose size is no number in memory (`RAW_HTABLE_SIZE`, twice 256 for unix sockets).
const RAW_BUCKETS: u64 = 256;
const UNIX_BUCKETS: u64 = 512;

/// Bytes of a bucket that is a pointer alone.
const POINTER: u64 = 8;

/// A hash table.
#[derive(Clone, Copy, Debug)]
pub(super) struct Table {
    protocol: Protocol,
    /// Where the first bucket's pointer is, and from one to the next.
    first: u64,
    each: u64,
    count: u64,
    /// From a socket to its link.
    node: u64,
    /// Whether the marker at a chain's end is its bucket's number.
    is_numbered: bool,
}

/// A bucket that holds a socket.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bucket {
    pub(super) protocol: Protocol,
    /// Where the pointer to the first socket is, and that pointer.
    pub(super) head: u64,
    pub(super) first: u64,
    /// From a socket to its link.
    pub(super) node: u64,
    /// What marks its end.
    pub(super) nulls: Option<u64>,
}

/// All tables of a kernel.
pub(super) fn all(kernel: &Kernel<'_>, layout: &Layout) -> Result<Vec<Table>, KernelError> {
    let nets = nets(kernel)?;
    let mut tables = Vec::new();
    let hashed = |protocol, first, each, count| Table {
        protocol,
        first,
        each,
        count,
        node: layout.node,
        is_numbered: false,
    };
    tcp(kernel, layout, &nets, &mut tables)?;
    for (protocol, table) in udp(kernel, &nets)? {
        let member = |member| kernel.offset("udp_table", member).map(|at| table.wrapping_add(at));
        let first = kernel.read_u64(member("hash")?)?.wrapping_add(kernel.offset("udp_hslot", "head")?);
        let count = count(kernel, member("mask")?)?;
        tables.push(hashed(protocol, first, kernel.size_of("udp_hslot")?, count));
    }
    // A kernel without IPv6 has no second one.
    for symbol in ["raw_v4_hashinfo", "raw_v6_hashinfo"] {
        if let Ok(table) = kernel.symbol(symbol) {
            let first = table.wrapping_add(kernel.offset("raw_hashinfo", "ht")?);
            tables.push(hashed(Protocol::Raw, first, POINTER, RAW_BUCKETS));
        }
    }
    if let Ok(buckets) = kernel.offset("net", "unx.table.buckets") {
        for net in nets {
            let first = kernel.read_u64(net.wrapping_add(buckets))?;
            tables.push(hashed(Protocol::Unix, first, POINTER, UNIX_BUCKETS));
        }
    } else {
        let first = kernel.symbol("unix_socket_table")?;
        tables.push(hashed(Protocol::Unix, first, POINTER, UNIX_BUCKETS));
    }
    Ok(tables)
}

/// All network namespaces.
fn nets(kernel: &Kernel<'_>) -> Result<Vec<u64>, KernelError> {
    let head = kernel.symbol("net_namespace_list")?;
    let too_many =
        || KernelError::Malformed { what: "more than 65,536 network namespaces".to_owned(), gva: head };
    let mut nets = Vec::new();
    for net in kernel.list_of(head, "net", "list")? {
        nets.push(net?);
        if nets.len() > MAX_NETS {
            return Err(too_many());
        }
    }
    Ok(nets)
}

/// TCP's tables, each two: of connections and of listeners.
fn tcp(
    kernel: &Kernel<'_>,
    layout: &Layout,
    nets: &[u64],
    tables: &mut Vec<Table>,
) -> Result<(), KernelError> {
    let mut all = BTreeSet::from([kernel.symbol("tcp_hashinfo")?]);
    let row = kernel.member("net", "ipv4.tcp_death_row")?;
    let hashinfo = kernel.offset("inet_timewait_death_row", "hashinfo")?;
    for net in nets {
        let at = net.wrapping_add(row.offset);
        // 6.0 alone has a pointer there.
        let row = if row.size == POINTER { kernel.read_u64(at)? } else { at };
        all.insert(kernel.read_u64(row.wrapping_add(hashinfo))?);
    }
    let table = |first, each, count, is_numbered| Table {
        protocol: Protocol::Tcp,
        first,
        each,
        count,
        node: layout.nulls_node,
        is_numbered,
    };
    for hashinfo in all {
        let member = |member| kernel.offset("inet_hashinfo", member).map(|at| hashinfo.wrapping_add(at));
        let first = kernel.read_u64(member("ehash")?)?;
        let each = kernel.size_of("inet_ehash_bucket")?;
        tables.push(table(first, each, count(kernel, member("ehash_mask")?)?, true));
        let each = kernel.size_of("inet_listen_hashbucket")?;
        let head = kernel.offset("inet_listen_hashbucket", "nulls_head")?;
        // Before 5.19 listeners are in an array of a fixed size.
        let (first, count) = match kernel.member("inet_hashinfo", "listening_hash") {
            Ok(array) => (hashinfo.wrapping_add(array.offset), array.size / each.max(1)),
            Err(_) => (kernel.read_u64(member("lhash2")?)?, count(kernel, member("lhash2_mask")?)?),
        };
        tables.push(table(first.wrapping_add(head), each, count, false));
    }
    Ok(())
}

/// UDP's tables.
fn udp(kernel: &Kernel<'_>, nets: &[u64]) -> Result<BTreeSet<(Protocol, u64)>, KernelError> {
    let mut all = BTreeSet::from([(Protocol::Udp, kernel.symbol("udp_table")?)]);
    all.extend(kernel.symbol("udplite_table").ok().map(|table| (Protocol::UdpLite, table)));
    if let Ok(at) = kernel.offset("net", "ipv4.udp_table") {
        for net in nets {
            all.insert((Protocol::Udp, kernel.read_u64(net.wrapping_add(at))?));
        }
    }
    Ok(all)
}

/// The number of buckets whose mask is at `gva`.
fn count(kernel: &Kernel<'_>, gva: u64) -> Result<u64, KernelError> {
    let count = u64::from(kernel.read_u32(gva)?) + 1;
    if count.is_power_of_two() && count <= MAX_BUCKETS {
        return Ok(count);
    }
    Err(KernelError::Malformed { what: "the size of the table of sockets".to_owned(), gva })
}

/// The buckets of several tables that hold a socket. It ends after an error.
#[derive(Debug)]
pub(super) struct Buckets<'a> {
    kernel: &'a Kernel<'a>,
    tables: std::vec::IntoIter<Table>,
    /// The present table, and the number of its next bucket.
    now: Option<(Table, u64)>,
    found: std::vec::IntoIter<Bucket>,
    left: u64,
}

impl<'a> Buckets<'a> {
    pub(super) fn new(kernel: &'a Kernel<'a>, tables: Vec<Table>) -> Self {
        let (tables, found) = (tables.into_iter(), Vec::new().into_iter());
        Self { kernel, tables, now: None, found, left: MAX_BUCKETS }
    }

    fn step(&mut self) -> Result<Option<Bucket>, KernelError> {
        loop {
            if let Some(bucket) = self.found.next() {
                return Ok(Some(bucket));
            }
            let Some((table, next)) = self.now.or_else(|| Some((self.tables.next()?, 0))) else {
                return Ok(None);
            };
            let batch = (table.count - next).min(BATCH);
            self.found = table.batch(self.kernel, next, batch)?.into_iter();
            let too_many = || KernelError::Malformed {
                what: "more than 16 million buckets of tables of sockets".to_owned(),
                gva: table.first,
            };
            self.left = self.left.checked_sub(batch).ok_or_else(too_many)?;
            self.now = Some((table, next + batch)).filter(|(table, next)| *next < table.count);
        }
    }
}

impl Iterator for Buckets<'_> {
    type Item = Result<Bucket, KernelError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.step().transpose()
    }
}

impl Table {
    /// Those of `count` buckets from `first` on that hold a socket.
    fn batch(&self, kernel: &Kernel<'_>, first: u64, count: u64) -> Result<Vec<Bucket>, KernelError> {
        let malformed =
            || KernelError::Malformed { what: "the table of sockets".to_owned(), gva: self.first };
        // The last bucket's pointer is the last that is read.
        let len = (count.max(1) - 1).checked_mul(self.each).and_then(|len| len.checked_add(POINTER));
        let len = len.and_then(|len| usize::try_from(len).ok()).filter(|len| *len <= 1 << 20);
        let mut bytes = vec![0; len.ok_or_else(malformed)?];
        let start = self.first.wrapping_add(first.wrapping_mul(self.each));
        kernel.read(start, &mut bytes)?;
        let mut buckets = Vec::new();
        for (number, at) in
            (first..first + count).zip((0..).step_by(usize::try_from(self.each).unwrap_or(1).max(1)))
        {
            let pointer = bytes.get(at..).and_then(|rest| rest.first_chunk().copied());
            let first = u64::from_le_bytes(pointer.unwrap_or_default());
            if first != 0 && first & 1 == 0 {
                buckets.push(Bucket {
                    protocol: self.protocol,
                    head: self.first.wrapping_add(number.wrapping_mul(self.each)),
                    first,
                    node: self.node,
                    nulls: self.is_numbered.then_some(number),
                });
            }
        }
        Ok(buckets)
    }
}
