// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a socket's values are, and what it is by them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::socket::{Ends, Kind, Protocol, Socket, State};
use crate::bytes::{Bytes, text};
use crate::kernel::{Kernel, KernelError};
use crate::process::FIRST_NAMESPACE;

/// Walks of a chain, and reads of a socket, that changes.
pub(super) const TRIES: u32 = 3;

/// Families of addresses.
const AF_UNIX: u16 = 1;
const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// States of a TCP connection that is not a `struct sock`.
const TIME_WAIT: u8 = 6;
const NEW_SYN_RECV: u8 = 12;

/// The most bytes of a socket that are read.
const MAX_LEN: u64 = 64 << 10;

/// The longest name of a unix socket (`struct sockaddr_un`), with the family before it.
const SUN_LEN: u32 = 110;
const FAMILY_LEN: u32 = 2;

/// Where everything is.
#[derive(Debug)]
pub(super) struct Layout {
    /// Bytes of what all sockets have, and of one that has a file.
    common_len: u64,
    sock_len: u64,
    family: u64,
    state: u64,
    num: u64,
    dport: u64,
    daddr: u64,
    rcv_saddr: u64,
    /// Local and remote address, in a kernel that has IPv6.
    v6: Option<(u64, u64)>,
    net: u64,
    /// Links of chains.
    pub(super) node: u64,
    pub(super) nulls_node: u64,
    socket: u64,
    uid: u64,
    kind: u64,
    /// From a `struct socket` to its inode's number.
    i_ino: u64,
    ns_inum: u64,
    unix: Unix,
}

/// Where unix sockets have more.
#[derive(Debug)]
struct Unix {
    addr: u64,
    peer: u64,
    /// In a `struct unix_address`.
    len: u64,
    name: u64,
}

/// What can be compared to find out whether a socket changed.
type Key = (Bytes, Option<(Option<u64>, Option<u32>)>);

impl Layout {
    pub(super) fn new(kernel: &Kernel<'_>) -> Result<Self, KernelError> {
        let common = |member| kernel.offset("sock_common", member);
        let sock = |member| kernel.offset("sock", member);
        let v6 = common("skc_v6_rcv_saddr").and_then(|local| Ok((local, common("skc_v6_daddr")?)));
        let inode =
            kernel.offset("socket_alloc", "vfs_inode")? + kernel.offset("inode", "i_ino")?;
        let mut layout = Self {
            common_len: kernel.size_of("sock_common")?.min(MAX_LEN),
            sock_len: 0,
            family: common("skc_family")?,
            state: common("skc_state")?,
            num: common("skc_num")?,
            dport: common("skc_dport")?,
            daddr: common("skc_daddr")?,
            rcv_saddr: common("skc_rcv_saddr")?,
            v6: v6.ok(),
            net: common("skc_net")?,
            node: common("skc_node")?,
            nulls_node: common("skc_nulls_node")?,
            socket: sock("sk_socket")?,
            uid: sock("sk_uid")?,
            kind: sock("sk_type")?,
            i_ino: inode.wrapping_sub(kernel.offset("socket_alloc", "socket")?),
            ns_inum: kernel.offset("net", "ns.inum")?,
            unix: Unix {
                addr: kernel.offset("unix_sock", "addr")?,
                peer: kernel.offset("unix_sock", "peer")?,
                len: kernel.offset("unix_address", "len")?,
                name: kernel.offset("unix_address", "name")?,
            },
        };
        let ends = [layout.socket, layout.uid, layout.kind, layout.unix.addr, layout.unix.peer];
        layout.sock_len = (ends.into_iter().max().unwrap_or(0) + 8).min(MAX_LEN);
        Ok(layout)
    }

    /// The socket at an address, in one of a protocol's tables.
    pub(super) fn socket(
        &self,
        kernel: &Kernel<'_>,
        gva: u64,
        protocol: Protocol,
    ) -> Result<Socket, KernelError> {
        let (mut last, mut is_torn) = (None, false);
        for _ in 0..TRIES {
            let socket = self.describe(kernel, gva, protocol);
            let again = self.describe(kernel, gva, protocol);
            is_torn = match (&socket, &again) {
                (Ok((_, one)), Ok((_, two))) => one != two,
                _ => true,
            };
            last = Some(socket);
            if !is_torn {
                break;
            }
        }
        let (socket, _) = last.unwrap_or_else(|| Err(malformed(gva)))?;
        Ok(Socket { is_torn, ..socket })
    }

    fn describe(
        &self,
        kernel: &Kernel<'_>,
        gva: u64,
        protocol: Protocol,
    ) -> Result<(Socket, Key), KernelError> {
        let mut common = Bytes::zeroed(self.common_len);
        kernel.read(gva, common.as_mut())?;
        let state = State::of(common.u8(self.state)).ok_or_else(|| malformed(gva))?;
        let netns = kernel.read_u32(common.u64(self.net).wrapping_add(self.ns_inum)).ok();
        let netns = netns.filter(|number| *number >= FIRST_NAMESPACE);
        let mut is_damaged = netns.is_none();
        // Of these the kernel keeps less than a whole socket.
        let is_whole = ![TIME_WAIT, NEW_SYN_RECV].contains(&common.u8(self.state));
        let mut sock = Bytes::default();
        let mut file = None;
        if is_whole {
            sock = Bytes::read(kernel, gva, self.sock_len)?;
            let inode = match sock.has(self.socket, 8) {
                true => self.inode(kernel, sock.u64(self.socket)).ok(),
                false => None,
            };
            file = Some((inode, Some(sock.u32(self.uid)).filter(|_| sock.has(self.uid, 4))));
            is_damaged |= !sock.is_whole() || inode.is_none();
        }
        let ends = match (protocol, common.u16(self.family)) {
            (Protocol::Unix, AF_UNIX) => self.unix_ends(kernel, gva, &sock, &mut is_damaged)?,
            (Protocol::Unix, _) => return Err(malformed(gva)),
            (_, AF_INET) => {
                let address = |at| IpAddr::V4(Ipv4Addr::from_bits(u32::from_be(common.u32(at))));
                self.inet_ends(&common, address(self.rcv_saddr), address(self.daddr))
            }
            (_, AF_INET6) => {
                let (local, peer) = self.v6.ok_or_else(|| malformed(gva))?;
                let address = |at| {
                    let halves =
                        [common.u64(at), common.u64(at.wrapping_add(8))].map(u64::to_le_bytes);
                    let mut bytes = [0; 16];
                    bytes.iter_mut().zip(halves.as_flattened()).for_each(|(to, from)| *to = *from);
                    IpAddr::V6(Ipv6Addr::from(bytes))
                };
                self.inet_ends(&common, address(local), address(peer))
            }
            _ => return Err(malformed(gva)),
        };
        let inode = file.and_then(|(inode, _)| inode).unwrap_or(0);
        let uid = file.and_then(|(_, uid)| uid);
        let socket =
            Socket { gva, protocol, state, ends, inode, uid, netns, is_torn: false, is_damaged };
        Ok((socket, (self.stable(&common), file)))
    }

    /// What a socket is by, without its chain and its counters.
    fn stable(&self, common: &Bytes) -> Bytes {
        let end = self.net.wrapping_add(8).min(self.common_len);
        common.part(0, end).unwrap_or_default()
    }

    /// The inode of a `struct socket`, 0 without one.
    fn inode(&self, kernel: &Kernel<'_>, socket: u64) -> Result<u64, KernelError> {
        if socket == 0 {
            return Ok(0);
        }
        let inode = kernel.read_u64(socket.wrapping_add(self.i_ino))?;
        // The file system of sockets numbers them from 1 on.
        if inode == 0 { Err(malformed(socket)) } else { Ok(inode) }
    }

    fn inet_ends(&self, common: &Bytes, local: IpAddr, peer: IpAddr) -> Ends {
        Ends::Inet {
            local: SocketAddr::new(local, common.u16(self.num)),
            peer: SocketAddr::new(peer, u16::from_be(common.u16(self.dport))),
        }
    }

    fn unix_ends(
        &self,
        kernel: &Kernel<'_>,
        gva: u64,
        sock: &Bytes,
        is_damaged: &mut bool,
    ) -> Result<Ends, KernelError> {
        let kind = match sock.u16(self.kind) {
            1 => Kind::Stream,
            2 => Kind::Datagram,
            5 => Kind::SeqPacket,
            _ => return Err(malformed(gva)),
        };
        let path = match sock.u64(self.unix.addr) {
            0 => None,
            address => self.path(kernel, address).ok().or_else(|| {
                *is_damaged = true;
                None
            }),
        };
        let inode_of =
            |peer: u64| self.inode(kernel, kernel.read_u64(peer.wrapping_add(self.socket))?);
        let peer = match sock.u64(self.unix.peer) {
            0 => None,
            peer => inode_of(peer).ok().or_else(|| {
                *is_damaged = true;
                None
            }),
        };
        Ok(Ends::Unix { kind, path, peer })
    }

    /// The name in a `struct unix_address`, as /proc/net/unix shows it.
    fn path(&self, kernel: &Kernel<'_>, address: u64) -> Result<String, KernelError> {
        let len = kernel.read_u32(address.wrapping_add(self.unix.len))?;
        let malformed =
            || KernelError::Malformed { what: "the unix address".to_owned(), gva: address };
        // One that is bound has a name.
        let len = len
            .checked_sub(FAMILY_LEN)
            .filter(|len| (1..=SUN_LEN).contains(len))
            .ok_or_else(malformed)?;
        let mut name = vec![0; usize::try_from(len).unwrap_or(0)];
        kernel.read(address.wrapping_add(self.unix.name + u64::from(FAMILY_LEN)), &mut name)?;
        if name.first() == Some(&0) {
            let bytes: Vec<u8> =
                name.iter().map(|byte| if *byte == 0 { b'@' } else { *byte }).collect();
            return Ok(String::from_utf8_lossy(&bytes).into_owned());
        }
        Ok(text(&name))
    }
}

fn malformed(gva: u64) -> KernelError {
    KernelError::Malformed { what: "the socket".to_owned(), gva }
}
