// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Requests as drivers make them, and as they should not.

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;

const RAM: usize = 0x4_0000;
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADER: u64 = 0x4000;
const STATUS: u64 = 0x5000;
const DATA: u64 = 0x1_0000;
/// `VIRTQ_DESC_F_NEXT` and `VIRTQ_DESC_F_WRITE` (virtio 1.2, 2.7.5).
const NEXT: u16 = 1;
const WRITE: u16 = 2;

/// A disk of four sectors, the n-th full of n, and a server on a queue of 16 that is never kicked.
struct Fixture {
    server: Server,
    path: tempfile::NamedTempFile,
}

impl Fixture {
    fn new(read_only: bool) -> Self {
        let mut path = tempfile::NamedTempFile::new().unwrap();
        for sector in 0..4 {
            path.write_all(&[sector; 512]).unwrap();
        }
        let block = Block::open(&DiskConfig { path: path.path().to_owned(), read_only }).unwrap();
        let memory: Arc<GuestMemoryMmap> =
            Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM)]).unwrap());
        let mut queue = Queue::new(16).unwrap();
        queue.set_desc_table_address(u32::try_from(DESCRIPTORS).ok(), None);
        queue.set_avail_ring_address(u32::try_from(AVAILABLE).ok(), None);
        queue.set_used_ring_address(u32::try_from(USED).ok(), None);
        queue.set_ready(true);
        let event = || EventFd::new(EFD_NONBLOCK).unwrap();
        let server = Server {
            image: block.image,
            memory,
            queue,
            kick: event(),
            interrupt: Interrupt::new(event()),
            quit: Arc::default(),
        };
        Self { server, path }
    }

    /// Puts a chain of (address, length, flags) into the queue and serves it; returns the length in
    /// the used ring.
    fn serve(&mut self, chain: &[(u64, u32, u16)]) -> u32 {
        let memory = self.server.memory.clone();
        for (index, (address, length, flags)) in (0u64..).zip(chain) {
            let at = DESCRIPTORS + 16 * index;
            memory.write_obj(*address, GuestAddress(at)).unwrap();
            memory.write_obj(*length, GuestAddress(at + 8)).unwrap();
            memory.write_obj(*flags, GuestAddress(at + 12)).unwrap();
            memory.write_obj(u16::try_from(index + 1).unwrap(), GuestAddress(at + 14)).unwrap();
        }
        let next = self.server.queue.next_avail();
        memory.write_obj(next + 1, GuestAddress(AVAILABLE + 2)).unwrap();
        memory.write_obj(0u16, GuestAddress(AVAILABLE + 4 + 2 * u64::from(next % 16))).unwrap();
        let chain = self.server.next_chain().unwrap();
        self.server.serve(chain)
    }

    fn request(&mut self, kind: u32, sector: u64, data: &[(u64, u32, u16)]) -> u8 {
        let memory = self.server.memory.clone();
        memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        memory.write_obj(sector, GuestAddress(HEADER + 8)).unwrap();
        memory.write_obj(0xeeu8, GuestAddress(STATUS)).unwrap();
        let mut chain = vec![(HEADER, 16, NEXT)];
        chain.extend(data.iter().map(|(address, length, flags)| (*address, *length, flags | NEXT)));
        chain.push((STATUS, 1, WRITE));
        self.serve(&chain);
        memory.read_obj(GuestAddress(STATUS)).unwrap()
    }
}

#[test]
fn sectors_are_read_and_written() {
    let mut disk = Fixture::new(false);
    assert_eq!(
        disk.request(VIRTIO_BLK_T_IN, 2, &[(DATA, 512, WRITE), (DATA + 0x1000, 512, WRITE)]),
        0
    );
    let memory = disk.server.memory.clone();
    assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(DATA + 508)).unwrap(), [2; 4]);
    assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(DATA + 0x1000)).unwrap(), [3; 4]);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, 0)]), 0);
    assert_eq!(disk.request(VIRTIO_BLK_T_FLUSH, 0, &[]), 0);
    assert_eq!(
        std::fs::read(disk.path.path()).unwrap()[..514],
        [[2; 512].as_slice(), &[1; 2]].concat()
    );
    assert_eq!(disk.request(VIRTIO_BLK_T_GET_ID, 0, &[(DATA, 20, WRITE)]), 0);
    assert_eq!(memory.read_obj::<[u8; 8]>(GuestAddress(DATA)).unwrap(), *b"kvmmem\0\0");
}

#[test]
fn requests_beyond_the_disk_or_its_rights_fail() {
    let mut disk = Fixture::new(false);
    for (sector, length) in [(4, 512), (3, 1024), (0, 511), (u64::MAX, 512), (1 << 55, 512)] {
        assert_eq!(
            disk.request(VIRTIO_BLK_T_IN, sector, &[(DATA, length, WRITE)]),
            1,
            "{sector:#x} {length}"
        );
    }
    assert_eq!(disk.request(99, 0, &[]), 2);
    let mut disk = Fixture::new(true);
    assert_eq!(disk.request(VIRTIO_BLK_T_OUT, 0, &[(DATA, 512, 0)]), 1);
    assert_eq!(disk.request(VIRTIO_BLK_T_IN, 0, &[(DATA, 512, WRITE)]), 0);
}

#[test]
fn malformed_chains_are_dropped() {
    let mut disk = Fixture::new(false);
    // No room for a status; outside of RAM; a chain that never ends.
    assert_eq!(disk.serve(&[(HEADER, 16, 0)]), 0);
    assert_eq!(disk.serve(&[(HEADER, 16, NEXT), (1 << 40, 512, WRITE)]), 0);
    let endless: Vec<_> = (0..16).map(|_| (HEADER, 16, NEXT)).collect();
    assert_eq!(disk.serve(&endless), 0);
}

proptest! {
    #[test]
    fn any_chain_is_survived(
        header in any::<[u8; 16]>(),
        kind in 0u32..12,
        chain in prop::collection::vec(
            (
                prop_oneof![Just(HEADER), Just(DATA), 0..RAM as u64 * 2, any::<u64>()],
                prop_oneof![Just(16u32), Just(512), Just(1), 0..0x2_0000u32, any::<u32>()],
                0u16..8,
            ),
            1..16,
        ),
    ) {
        let mut disk = Fixture::new(false);
        disk.server.memory.write_obj(header, GuestAddress(HEADER)).unwrap();
        disk.server.memory.write_obj(kind, GuestAddress(HEADER)).unwrap();
        disk.serve(&chain);
    }
}
