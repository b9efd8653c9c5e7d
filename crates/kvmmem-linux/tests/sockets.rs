// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Sockets of a kernel that a builder wrote, and of one that lies.

mod common;

use common::objects::{
    self, CALLS, EHASH, HASHINFO, NETNS, NETS, RAW, UDP, UNIX, UNIX_COUNT, at, sock,
};
use common::{Guest, KALLSYMS, Place};
use kvmmem_linux::sockets::{Ends, Kind, Protocol, Socket, Sockets, State};
use kvmmem_linux::{Find, Kernel, KernelError};
use proptest::prelude::*;

const PLACE: Place = Place::FIRST;

fn sockets(guest: &Guest) -> Result<Vec<Socket>, KernelError> {
    let kernel = Kernel::find(guest, Find { note: Some(PLACE.note), ..Find::default() }).unwrap();
    Sockets::new(&kernel)?.collect()
}

fn gva(object: u64) -> u64 {
    PLACE.gva + objects::OBJECTS + object
}

#[test]
fn each_protocol_is_found_in_its_tables() {
    let guest = objects::guest(&PLACE);
    let found = sockets(&guest).unwrap();
    let lines: Vec<_> = found
        .iter()
        .map(|socket| {
            assert_eq!(
                (socket.netns, socket.is_torn, socket.is_damaged),
                (Some(NETNS), false, false)
            );
            let ends = match &socket.ends {
                Ends::Inet { local, peer } => format!("{local} {peer}"),
                Ends::Unix { kind, path, peer } => {
                    assert_eq!(*kind, Kind::Stream);
                    format!("{path:?} {peer:?}")
                }
            };
            (socket.protocol_name(), socket.state.name(), ends, socket.inode, socket.uid)
        })
        .collect();
    let expected = [
        ("tcp", "time-wait", "127.0.0.1:4321 127.0.0.2:51441", 0, None),
        ("tcp", "established", "127.0.0.1:4321 127.0.0.2:51440", 300, Some(1000)),
        ("tcp", "established", "127.0.0.1:51440 127.0.0.2:4321", 301, Some(1001)),
        ("tcp6", "listen", "[::1]:4322 [::]:0", 303, Some(1003)),
        ("udp", "unconnected", "127.0.0.1:5353 127.0.0.2:0", 304, Some(1004)),
        ("raw", "unconnected", "127.0.0.1:253 127.0.0.2:0", 305, Some(1005)),
        ("unix", "established", "Some(\"/tmp/s\") Some(307)", 0, Some(1008)),
        ("unix", "established", "None Some(0)", 307, Some(1007)),
        ("unix", "listen", "Some(\"/tmp/s\") None", 306, Some(1006)),
    ];
    let expected = expected
        .map(|(protocol, state, ends, inode, uid)| (protocol, state, ends.to_owned(), inode, uid));
    assert_eq!(lines, expected);
    assert_eq!(found[1].state, State::Established);
}

/// Whether an error is the one that is expected.
type IsIt = fn(&KernelError) -> bool;

/// The link of a socket leads where another chain ends, to itself, or to nowhere.
#[test]
fn a_damaged_chain_is_an_error() {
    let link = at(&PLACE, sock(0));
    let cases: [(u64, IsIt); 5] = [
        // The marker of bucket 5, in bucket 2.
        (5 << 1 | 1, |error| matches!(error, KernelError::Malformed { .. })),
        (0, |error| matches!(error, KernelError::Malformed { .. })),
        (gva(sock(0)), |error| matches!(error, KernelError::Endless { .. })),
        (gva(sock(2)), |error| matches!(error, KernelError::Endless { .. })),
        (0x1234_5678, |error| matches!(error, KernelError::Read { gva: 0x1234_5678, .. })),
    ];
    for (next, is_it) in cases {
        let guest = objects::guest(&PLACE);
        guest.put_word(link, next);
        let error = sockets(&guest).unwrap_err();
        assert!(is_it(&error), "{next:#x}: {error:?}");
    }
}

#[test]
fn what_is_no_socket_is_an_error() {
    // Family, state, type of a unix socket.
    for (object, byte) in
        [(sock(1) + 16, 3), (sock(1) + 18, 13), (sock(1) + 18, 0), (sock(7) + 0x8c, 4)]
    {
        let guest = objects::guest(&PLACE);
        guest.put(at(&PLACE, object), &[byte]);
        let error = sockets(&guest).unwrap_err();
        assert!(matches!(error, KernelError::Malformed { .. }), "{object:#x}: {error:?}");
    }
}

/// A page of zeros is a table without sockets, but the kernel counts some.
#[test]
fn a_table_of_unix_sockets_that_was_zeroed_is_an_error() {
    let guest = objects::guest(&PLACE);
    guest.put(at(&PLACE, UNIX), &[0; 4096]);
    // A kernel without unix sockets.
    assert!(sockets(&guest).unwrap().iter().all(|socket| socket.protocol != Protocol::Unix));
    guest.put_word(at(&PLACE, UNIX_COUNT), 3);
    let error = sockets(&guest).unwrap_err();
    assert!(error.to_string().contains("the table of unix sockets"), "{error}");
    assert!(error.is_local());
}

/// Tables with more buckets than there is memory for, or with a number that is not a power of two.
#[test]
fn the_size_of_a_table_is_limited() {
    for mask in [u32::MAX, 6, (1 << 25) - 1] {
        for table in [HASHINFO, HASHINFO + 16, UDP] {
            let guest = objects::guest(&PLACE);
            guest.put(at(&PLACE, table + 8), &mask.to_le_bytes());
            let error = sockets(&guest).unwrap_err();
            assert!(matches!(error, KernelError::Malformed { .. }), "{mask:#x}: {error:?}");
        }
    }
}

/// A socket that two chains share is listed once: the kernel reuses the memory of one that was
/// closed.
#[test]
fn a_socket_is_listed_once() {
    let guest = objects::guest(&PLACE);
    let before = sockets(&guest).unwrap().len();
    guest.put_word(at(&PLACE, 0x2408), 0);
    guest.put_word(at(&PLACE, 0x2400), gva(sock(4)));
    assert_eq!(sockets(&guest).unwrap().len(), before);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn no_byte_does_harm(
        changes in proptest::collection::vec(
            (
                prop_oneof![HASHINFO..HASHINFO + 0x40, EHASH..EHASH + 0x40, UDP..UDP + 0x200, NETS - 0x100..NETS + 0x10,
                    sock(0)..sock(9), 0x6000u64..0x6810, 0x4000u64..0x5000],
                prop_oneof![Just(0u64), Just(u64::MAX), any::<u64>(), 0u64..0x4000, (0u64..0xc000).prop_map(gva)],
                1usize..9,
            ),
            1..12,
        ),
    ) {
        let guest = objects::guest(&PLACE);
        for (object, value, len) in changes {
            guest.put(at(&PLACE, object), &value.to_le_bytes()[..len]);
        }
        if let Ok(found) = sockets(&guest) {
            prop_assert!(found.len() < 100);
        }
    }
}

/// Debian has IPv6 in its kernel, others have it as a module.
#[test]
fn the_table_of_a_module_is_found_by_its_own_symbols() {
    let guest = objects::guest(&PLACE);
    let symbols = guest.bytes(PLACE.gpa + KALLSYMS, 0x8_0000);
    let name = symbols.windows(15).position(|name| name == b"raw_v6_hashinfo").unwrap();
    guest.put(PLACE.gpa + KALLSYMS + name as u64, b"raw_v6_hashinf0");
    // The raw socket is in the second table alone.
    let [v4, v6] = RAW.map(|table| at(&PLACE, table + 8 * 200));
    let sock = guest.bytes(v4, 8);
    guest.put(v4, &[0; 8]);
    guest.put(v6, &sock);
    let raw = |guest: &Guest| {
        let sockets = sockets(guest).unwrap();
        sockets.iter().filter(|socket| socket.protocol == Protocol::Raw).count()
    };
    assert_eq!(raw(&guest), 0);
    let module = [("raw_v6_hash", CALLS), ("raw_v6_hashinfo", RAW[1]), ("raw_v6_hashinfo_", CALLS)];
    objects::name_module(&guest, &PLACE, 1, "ipv6", &module);
    assert_eq!(raw(&guest), 1);
    objects::name_module(&guest, &PLACE, 1, "ipv6_", &module);
    assert_eq!(raw(&guest), 0);
    // A table without an end is an error, and not a kernel without IPv6.
    objects::name_module(&guest, &PLACE, 1, "ipv6", &module);
    guest.put(at(&PLACE, objects::module(1) + 0x98), &[0; 8]);
    assert!(sockets(&guest).is_err());
}
