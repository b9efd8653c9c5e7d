// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The log of a kernel in memory that is made here, as kernel/printk/printk_ringbuffer.c would make
//! it.

use std::sync::Mutex;
use std::time::Duration;

use kvmmem_linux::Kernel;
use kvmmem_linux::log::{Caller, LogError, records};
use kvmmem_linux::vmcoreinfo::Note;
use kvmmem_memory::{Memory, MemoryError, Range};
use proptest::prelude::*;

/// Guest-virtual address of the memory's begin: its page tables map 2 MiB there.
const BASE: u64 = 0xffff_ffff_8000_0000;
/// Places of things in memory.
const PRB: usize = 0x5000;
const RING: usize = 0x5100;
const DESCS: usize = 0x6000;
const INFOS: usize = 0x7000;
const TEXT: usize = 0x8000;
/// Four descriptors, and 64 bytes of text.
const COUNT_BITS: u32 = 2;
const SIZE_BITS: u32 = 6;
const INFO_SIZE: usize = 88;

const NOTE: &str = "SYMBOL(swapper_pg_dir)=ffffffff80001000\nNUMBER(phys_base)=0\nSYMBOL(prb)=ffffffff80005000\n\
OFFSET(printk_ringbuffer.desc_ring)=0\nOFFSET(printk_ringbuffer.text_data_ring)=48\n\
OFFSET(prb_desc_ring.count_bits)=0\nOFFSET(prb_desc_ring.descs)=8\nOFFSET(prb_desc_ring.infos)=16\n\
OFFSET(prb_desc_ring.head_id)=24\nOFFSET(prb_desc_ring.tail_id)=32\nSIZE(prb_desc)=24\nOFFSET(prb_desc.state_var)=0\n\
OFFSET(prb_desc.text_blk_lpos)=8\nOFFSET(prb_data_blk_lpos.begin)=0\nOFFSET(prb_data_blk_lpos.next)=8\n\
SIZE(printk_info)=88\nOFFSET(printk_info.seq)=0\nOFFSET(printk_info.ts_nsec)=8\nOFFSET(printk_info.text_len)=16\n\
OFFSET(printk_info.caller_id)=20\nOFFSET(printk_info.dev_info)=24\nOFFSET(dev_printk_info.subsystem)=0\n\
LENGTH(printk_info_subsystem)=16\nOFFSET(dev_printk_info.device)=16\nLENGTH(printk_info_device)=48\n\
OFFSET(prb_data_ring.size_bits)=0\nOFFSET(prb_data_ring.data)=8\nOFFSET(atomic_long_t.counter)=0\n";

/// A guest of 64 KiB.
struct Guest(Vec<u8>);

impl Memory for Guest {
    fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let start = usize::try_from(gpa).unwrap();
        let bytes = self.0.get(start..).and_then(|rest| rest.get(..buf.len()));
        buf.copy_from_slice(bytes.ok_or(MemoryError::Hole { gpa })?);
        Ok(())
    }

    fn ranges(&self) -> Result<Vec<Range>, MemoryError> {
        Ok(vec![Range { gpa: 0, len: self.0.len() as u64 }])
    }
}

impl Guest {
    /// With an empty log whose ids begin where a kernel's do, four before they wrap around.
    fn new() -> Self {
        let mut guest = Self(vec![0; 0x1_0000]);
        guest.put(0x1000 + 511 * 8, 0x2000 | 1);
        guest.put(0x2000 + 510 * 8, 0x3000 | 1);
        // A page of 2 MiB.
        guest.put(0x3000, 1 << 7 | 1);
        guest.put(PRB, BASE + RING as u64);
        guest.put(RING, COUNT_BITS.into());
        guest.put(RING + 8, BASE + DESCS as u64);
        guest.put(RING + 16, BASE + INFOS as u64);
        guest.put(RING + 48, SIZE_BITS.into());
        guest.put(RING + 56, BASE + TEXT as u64);
        guest
    }

    fn put(&mut self, at: usize, word: u64) {
        self.0[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }

    fn ids(&mut self, tail: u64, head: u64) {
        self.put(RING + 24, head);
        self.put(RING + 32, tail);
    }

    /// Writes a record, with its text at `begin` where it has one.
    fn record(&mut self, id: u64, state: u64, seq: u64, begin: u64, next: u64, text: &[u8]) {
        let index = usize::try_from(id % 4).unwrap();
        let desc = DESCS + index * 24;
        self.put(desc, state << 62 | id);
        self.put(desc + 8, begin);
        self.put(desc + 16, next);
        let info = INFOS + index * INFO_SIZE;
        self.put(info, seq);
        self.put(info + 8, 1_500_000_000 + seq);
        let len = u16::try_from(text.len()).unwrap();
        self.0[info + 16..info + 18].copy_from_slice(&len.to_le_bytes());
        // Facility 1, level 3.
        self.0[info + 18] = 1;
        self.0[info + 19] = 3 << 5 | 1;
        self.0[info + 20..info + 24].copy_from_slice(&(0x8000_0000_u32 | 7).to_le_bytes());
        self.0[info + 24..info + 27].copy_from_slice(b"pci");
        self.0[info + 40..info + 43].copy_from_slice(b"+x\0");
        if begin & 1 == 0 {
            let wraps = begin / 64 != (next - 1) / 64;
            let at = TEXT + if wraps { 0 } else { usize::try_from(begin % 64).unwrap() };
            self.put(at, id);
            self.0[at + 8..at + 8 + text.len()].copy_from_slice(text);
        }
    }

    fn texts(&self) -> Vec<(u64, String)> {
        let kernel = Kernel::of_note(self, Note::of_text(0, NOTE.to_owned())).unwrap();
        let records = records(&kernel).unwrap().map(|record| record.unwrap());
        records.map(|record| (record.seq, record.text)).collect()
    }
}

#[test]
fn records_are_read_in_order_with_all_they_have() {
    let last = (1 << 62) - 1;
    let mut guest = Guest::new();
    guest.ids(last, 2);
    guest.record(last, 2, 11, 0, 24, b"first\nof two");
    // An empty line.
    guest.record(0, 1, 12, 3, 3, b"");
    // Not before the ring's end, so at its begin.
    guest.record(1, 2, 13, 24 + 16, 64 + 24, b"wrapped \xff");
    // Being written.
    guest.record(2, 0, 14, 1, 1, b"");
    // The wrapped one has overwritten the first one's text.
    assert_eq!(guest.texts(), [(12, String::new()), (13, "wrapped \u{fffd}".to_owned())]);
    guest.record(last, 2, 11, 24, 24 + 24, b"first\nof two");
    let note = Note::of_text(0, NOTE.to_owned());
    let kernel = Kernel::of_note(&guest, note).unwrap();
    let mut all = records(&kernel).unwrap();
    let first = all.next().unwrap().unwrap();
    assert_eq!((first.seq, first.text.as_str()), (11, "first\nof two"));
    assert_eq!((first.level, first.facility, first.caller), (3, 1, Caller::Cpu(7)));
    assert_eq!((first.subsystem.as_str(), first.device.as_str()), ("pci", "+x"));
    assert_eq!(first.time, Duration::from_nanos(1_500_000_011));
    assert_eq!((&mut all).count(), 2);
    assert_eq!((all.overwritten(), all.damaged()), (0, 0));
}

#[test]
fn a_block_that_ends_with_the_ring_is_not_wrapped() {
    let mut guest = Guest::new();
    guest.ids(5, 5);
    guest.record(5, 2, 1, 64 + 40, 128, b"at the end");
    assert_eq!(guest.texts(), [(1, "at the end".to_owned())]);
}

#[test]
fn what_does_not_fit_while_it_should_be_there_is_damaged() {
    let three = || {
        let mut guest = Guest::new();
        guest.ids(4, 6);
        guest.record(4, 2, 4, 0, 16, b"one");
        guest.record(5, 2, 5, 16, 32, b"two");
        guest.record(6, 2, 6, 32, 48, b"three");
        guest
    };
    let read = |guest: &Guest| {
        let kernel = Kernel::of_note(guest, Note::of_text(0, NOTE.to_owned())).unwrap();
        let mut all = records(&kernel).unwrap();
        let seqs: Vec<u64> = (&mut all).map(|record| record.unwrap().seq).collect();
        (seqs, all.overwritten(), all.damaged())
    };
    assert_eq!(read(&three()), (vec![4, 5, 6], 0, 0));
    // Descriptors, texts or the rest of all are zeros, as in a dump with a page that could not be
    // read.
    for place in [DESCS, INFOS, TEXT] {
        let mut guest = three();
        guest.0[place..place + 0x200].fill(0);
        assert_eq!(read(&guest), (vec![], 0, 3), "{place:#x}");
    }
    let mut guest = three();
    // The descriptor of 4 is that of 8, the text of 5 another's, and zeros are in that of 6.
    guest.record(8, 0, 8, 0, 16, b"one");
    guest.put(TEXT + 16, 77);
    guest.0[TEXT + 42] = 0;
    assert_eq!(read(&guest), (vec![], 0, 3));
    // One whose text was given away before, and one that is not finished.
    let mut guest = three();
    guest.record(4, 3, 4, 0, 16, b"one");
    guest.record(6, 0, 6, 32, 48, b"three");
    assert_eq!(read(&guest), (vec![5], 0, 0));
    // Memory that is missing.
    let mut guest = three();
    guest.put(RING + 16, BASE + 0x40_0000);
    assert_eq!(read(&guest), (vec![], 0, 3));
}

/// A guest that writes to its log when a byte of its memory is read.
struct ChangingLog {
    guest: Mutex<Guest>,
    at: u64,
    write: fn(&mut Guest),
}

impl Memory for ChangingLog {
    fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let mut guest = self.guest.lock().unwrap();
        guest.read_at(gpa, buf)?;
        if (gpa..gpa + buf.len() as u64).contains(&self.at) {
            (self.write)(&mut guest);
        }
        Ok(())
    }

    fn ranges(&self) -> Result<Vec<Range>, MemoryError> {
        self.guest.lock().unwrap().ranges()
    }
}

#[test]
fn what_the_guest_overwrites_meanwhile_is_not_damaged() {
    let mut guest = Guest::new();
    guest.ids(4, 6);
    guest.record(4, 2, 4, 0, 16, b"one");
    guest.record(5, 2, 5, 16, 32, b"two");
    guest.record(6, 2, 6, 32, 48, b"three");
    // While the first text is read, its descriptor goes to another record, and the second one's
    // text too.
    let write = |guest: &mut Guest| {
        guest.ids(5, 8);
        guest.record(8, 0, 8, 0, 16, b"one");
        guest.record(5, 3, 5, 16, 32, b"two");
    };
    let guest = ChangingLog { guest: Mutex::new(guest), at: TEXT as u64 + 8, write };
    let kernel = Kernel::of_note(&guest, Note::of_text(0, NOTE.to_owned())).unwrap();
    let mut all = records(&kernel).unwrap();
    let texts: Vec<String> = (&mut all).map(|record| record.unwrap().text).collect();
    assert_eq!((texts, all.overwritten(), all.damaged()), (vec!["three".to_owned()], 2, 0));
}

#[test]
fn a_note_or_ring_that_makes_no_sense_is_an_error() {
    let guest = Guest::new();
    for (from, to) in
        [("SYMBOL(prb)", "X"), ("SIZE(prb_desc)=24", "SIZE(prb_desc)=-1"), ("=88", "=5000")]
    {
        let note = Note::of_text(0, NOTE.replace(from, to));
        let kernel = Kernel::of_note(&guest, note).unwrap();
        assert!(matches!(records(&kernel), Err(LogError::Note(_))), "{from}");
    }
    for (at, word) in [(RING, 27), (RING + 48, 33), (RING + 24, 4), (PRB, BASE + 0x10_0000)] {
        let mut guest = Guest::new();
        guest.put(at, word);
        let kernel = Kernel::of_note(&guest, Note::of_text(0, NOTE.to_owned())).unwrap();
        assert!(matches!(records(&kernel), Err(LogError::Kernel(_))), "{at:#x}");
    }
}

proptest! {
    #[test]
    fn no_ring_does_harm(
        ring in proptest::collection::vec(any::<u8>(), 0x60),
        keeps in 0_usize..6,
        noise in proptest::collection::vec(any::<u8>(), 0x300),
        ids in (any::<u64>(), 0_u64..5),
    ) {
        let mut guest = Guest::new();
        let good = guest.0[RING..RING + 0x60].to_vec();
        guest.0[RING..RING + 0x60].copy_from_slice(&ring);
        // Some of what leads on stays right.
        guest.0[RING..RING + keeps * 16].copy_from_slice(&good[..keeps * 16]);
        for place in [DESCS, INFOS, TEXT] {
            guest.0[place..place + noise.len()].copy_from_slice(&noise);
        }
        if keeps > 2 {
            guest.ids(ids.0, ids.0.wrapping_add(ids.1));
        }
        let kernel = Kernel::of_note(&guest, Note::of_text(0, NOTE.to_owned())).unwrap();
        if let Ok(records) = records(&kernel) {
            prop_assert!(records.take(1 << 10).count() < 1 << 10);
        }
    }
}
