// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The hash tables that sockets are in: one of TCP for connections and one for listeners, one of
//! UDP, one of raw sockets for each version of IP, one of unix sockets. Since 6.0 a network
//! namespace can have its own of TCP, since 6.2 of UDP; unix sockets have one in each namespace
//! since 6.0.

use std::collections::BTreeSet;

use super::layout::Layout;
use super::socket::Protocol;
use crate::bytes::Bytes;
use crate::kernel::{Kernel, KernelError};

/// The most network namespaces.
const MAX_NETS: usize = 1 << 16;

/// The most buckets of all tables together: 128 MiB of them.
const MAX_BUCKETS: u64 = 1 << 24;

/// Buckets that are read at once.
const BATCH: u64 = 512;

/// Buckets of the tables whose size is not in memory (`RAW_HTABLE_SIZE`, twice 256 for unix
/// sockets).
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
    /// Whether a marker is at a chain's end, and whether it is the bucket's number.
    is_marked: bool,
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
    /// Whether its end is marked, and the mark's number if that is known.
    pub(super) is_marked: bool,
    pub(super) nulls: Option<u64>,
}

/// All tables of a kernel, and why some cannot be found.
pub(super) fn all(
    kernel: &Kernel<'_>,
    layout: &Layout,
) -> Result<(Vec<Table>, Vec<KernelError>), KernelError> {
    let (nets, mut lost) = nets(kernel)?;
    let mut tables = Vec::new();
    let hashed = |protocol, first, each, count| Table {
        protocol,
        first,
        each,
        count,
        node: layout.node,
        is_marked: false,
        is_numbered: false,
    };
    lost.extend(tcp(kernel, layout, &nets, &mut tables)?);
    for (protocol, table) in udp(kernel, &nets, &mut lost)? {
        let member = |member| kernel.offset("udp_table", member).map(|at| table.wrapping_add(at));
        let (hash, mask, head) =
            (member("hash")?, member("mask")?, kernel.offset("udp_hslot", "head")?);
        let each = kernel.size_of("udp_hslot")?;
        match kernel.read_u64(hash).and_then(|first| Ok((first, count(kernel, mask)?))) {
            Ok((first, count)) => {
                tables.push(hashed(protocol, first.wrapping_add(head), each, count))
            }
            Err(error) => lost.push(error),
        }
    }
    // A kernel without IPv6 has no second one; one with IPv6 as a module has it there.
    for (symbol, module) in [("raw_v4_hashinfo", "ipv4"), ("raw_v6_hashinfo", "ipv6")] {
        match kernel.symbol_or_of_module(symbol, module) {
            Ok(Some(table)) => {
                let first = table.wrapping_add(kernel.offset("raw_hashinfo", "ht")?);
                tables.push(hashed(Protocol::Raw, first, POINTER, RAW_BUCKETS));
            }
            Ok(None) => {}
            Err(error) if error.is_final() => return Err(error),
            Err(error) => lost.push(error),
        }
    }
    if let Ok(buckets) = kernel.offset("net", "unx.table.buckets") {
        for net in nets {
            match kernel.read_u64(net.wrapping_add(buckets)) {
                Ok(first) => tables.push(hashed(Protocol::Unix, first, POINTER, UNIX_BUCKETS)),
                Err(error) => lost.push(error),
            }
        }
    } else {
        let symbol = "unix_socket_table";
        let first = kernel.symbol_or_of_module(symbol, "unix")?;
        let first = first.ok_or_else(|| KernelError::NoSymbol { name: symbol.to_owned() })?;
        tables.push(hashed(Protocol::Unix, first, POINTER, UNIX_BUCKETS));
    }
    // Without any table there is no list.
    if tables.is_empty() && !lost.is_empty() {
        return Err(lost.swap_remove(0));
    }
    Ok((tables, lost))
}

/// All network namespaces, and why some cannot be found.
fn nets(kernel: &Kernel<'_>) -> Result<(Vec<u64>, Vec<KernelError>), KernelError> {
    let head = kernel.symbol("net_namespace_list")?;
    let (mut nets, mut lost) = (Vec::new(), Vec::new());
    let mut list = kernel.list_of(head, "net", "list")?;
    loop {
        match list.next_with(Ok) {
            Ok(Some((net, _))) => nets.push(net),
            Ok(None) => break,
            Err(error) if error.is_local() => lost.push(error),
            Err(error) => return Err(error),
        }
        if nets.len() > MAX_NETS {
            return Err(KernelError::TooMuch { what: "65,536 network namespaces" });
        }
    }
    // There is one at least.
    if nets.is_empty() {
        let malformed = || KernelError::Malformed {
            what: "the list of network namespaces".to_owned(),
            gva: head,
        };
        return Err(lost.pop().unwrap_or_else(malformed));
    }
    Ok((nets, lost))
}

/// TCP's tables, each two: of connections and of listeners.
fn tcp(
    kernel: &Kernel<'_>,
    layout: &Layout,
    nets: &[u64],
    tables: &mut Vec<Table>,
) -> Result<Vec<KernelError>, KernelError> {
    let mut lost = Vec::new();
    let mut all = BTreeSet::from([kernel.symbol("tcp_hashinfo")?]);
    let row = kernel.member("net", "ipv4.tcp_death_row")?;
    let hashinfo = kernel.offset("inet_timewait_death_row", "hashinfo")?;
    for net in nets {
        let at = net.wrapping_add(row.offset);
        // 6.0 alone has a pointer there.
        let row = if row.size == POINTER { kernel.read_u64(at) } else { Ok(at) };
        match row.and_then(|row| kernel.read_u64(row.wrapping_add(hashinfo))) {
            // A namespace that is not complete yet has none.
            Ok(hashinfo) => all.extend(Some(hashinfo).filter(|hashinfo| *hashinfo != 0)),
            Err(error) => lost.push(error),
        }
    }
    let table = |first, each, count, is_numbered| Table {
        protocol: Protocol::Tcp,
        first,
        each,
        count,
        node: layout.nulls_node,
        is_marked: true,
        is_numbered,
    };
    for hashinfo in all {
        let member =
            |member| kernel.offset("inet_hashinfo", member).map(|at| hashinfo.wrapping_add(at));
        let place = |first: u64, mask: u64| {
            Ok::<_, KernelError>((kernel.read_u64(first)?, count(kernel, mask)?))
        };
        let each = kernel.size_of("inet_ehash_bucket")?;
        match place(member("ehash")?, member("ehash_mask")?) {
            Ok((first, count)) => tables.push(table(first, each, count, true)),
            Err(error) => lost.push(error),
        }
        let each = kernel.size_of("inet_listen_hashbucket")?;
        let head = kernel.offset("inet_listen_hashbucket", "nulls_head")?;
        // Before 5.19 listeners are in an array of a fixed size.
        let listeners = match kernel.member("inet_hashinfo", "listening_hash") {
            Ok(array) => Ok((hashinfo.wrapping_add(array.offset), array.size / each.max(1))),
            Err(_) => place(member("lhash2")?, member("lhash2_mask")?),
        };
        match listeners {
            Ok((first, count)) => tables.push(table(first.wrapping_add(head), each, count, false)),
            Err(error) => lost.push(error),
        }
    }
    Ok(lost)
}

/// UDP's tables.
fn udp(
    kernel: &Kernel<'_>,
    nets: &[u64],
    lost: &mut Vec<KernelError>,
) -> Result<BTreeSet<(Protocol, u64)>, KernelError> {
    let mut all = BTreeSet::from([(Protocol::Udp, kernel.symbol("udp_table")?)]);
    all.extend(kernel.symbol("udplite_table").ok().map(|table| (Protocol::UdpLite, table)));
    if let Ok(at) = kernel.offset("net", "ipv4.udp_table") {
        for net in nets {
            match kernel.read_u64(net.wrapping_add(at)) {
                Ok(table) => all.extend(Some((Protocol::Udp, table)).filter(|_| table != 0)),
                Err(error) => lost.push(error),
            }
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

/// Buckets of several tables that hold a socket. An error stands for buckets that cannot be read.
#[derive(Debug)]
pub(super) struct Buckets<'a> {
    kernel: &'a Kernel<'a>,
    tables: std::vec::IntoIter<Table>,
    /// The present table, and the number of its next bucket.
    now: Option<(Table, u64)>,
    found: std::vec::IntoIter<Result<Bucket, KernelError>>,
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
                return bucket.map(Some);
            }
            let Some((table, next)) = self.now.or_else(|| Some((self.tables.next()?, 0))) else {
                return Ok(None);
            };
            let batch = (table.count - next).min(BATCH);
            let left = self.left.checked_sub(batch);
            self.left = left
                .ok_or(KernelError::TooMuch { what: "16 million buckets of tables of sockets" })?;
            self.now = Some((table, next + batch)).filter(|(table, next)| *next < table.count);
            self.found = table.batch(self.kernel, next, batch)?.into_iter();
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
    /// The buckets that hold a socket among `count` from `first` on, and an error if some cannot be
    /// read.
    fn batch(
        &self,
        kernel: &Kernel<'_>,
        first: u64,
        count: u64,
    ) -> Result<Vec<Result<Bucket, KernelError>>, KernelError> {
        let malformed =
            || KernelError::Malformed { what: "the table of sockets".to_owned(), gva: self.first };
        // The last bucket's pointer is the last that is read.
        let len =
            (count.max(1) - 1).checked_mul(self.each).and_then(|len| len.checked_add(POINTER));
        let len = len.filter(|len| *len <= 1 << 20).ok_or_else(malformed)?;
        let bytes =
            Bytes::read(kernel, self.first.wrapping_add(first.wrapping_mul(self.each)), len)?;
        let mut is_damaged = false;
        let mut buckets = Vec::new();
        for (number, at) in (first..first + count)
            .zip((0..).step_by(usize::try_from(self.each.max(1)).unwrap_or(1)))
        {
            let pointer = bytes.u64(at);
            // The chain of a bucket without sockets is its marker alone.
            if !bytes.has(at, POINTER) || pointer == 0 && self.is_marked {
                is_damaged = true;
            } else if pointer != 0 && pointer & 1 == 0 {
                buckets.push(Ok(Bucket {
                    protocol: self.protocol,
                    head: self.first.wrapping_add(number.wrapping_mul(self.each)),
                    first: pointer,
                    node: self.node,
                    is_marked: self.is_marked,
                    nulls: self.is_numbered.then_some(number),
                }));
            }
        }
        buckets.extend(is_damaged.then(|| Err(malformed())));
        Ok(buckets)
    }
}
