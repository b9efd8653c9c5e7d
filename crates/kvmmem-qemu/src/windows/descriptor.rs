// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A view's descriptor pages: one for each PCI slot, of which the first says what the view shows.
//!
//! A guest can write them at any time. They are written by `pwrite` and never mapped here, and
//! nothing is read from them but two numbers that the guest's driver puts there.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use kvmmem_abi::descriptor::{
    COMPLAINT_AT, COMPLAINT_INVALID, COMPLAINT_NO_ADDRESS, COMPLAINT_NOT_CACHED, Descriptor,
    GENERATION_AT, SEEN_AT, SIZE, SLOT_AT, WindowRange,
};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::io::Errno;

use kvmmem_proto::map::PAGE_SIZE;

/// The generation of a view that was never changed.
const FIRST_GENERATION: u64 = 2;

/// Where the state ends, which follows the generation.
const STATE_END: usize = GENERATION_AT + 8 + 4;

/// The pages of one view.
#[derive(Debug)]
pub struct Pages {
    files: Vec<Arc<OwnedFd>>,
    descriptor: Descriptor,
    ranges: Vec<WindowRange>,
}

/// What a guest's driver finds wrong with a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Complaint {
    /// A BAR got no address.
    #[error(
        "the guest has no room for the windows: give the PCI root port a larger pref64-reserve, or an i440FX a larger pci-hole64-size, and the CPU host-phys-bits=on, as `kvmmem qemu-args` says"
    )]
    NoAddress,
    /// A window can be mapped neither write-back nor write-through.
    #[error("the guest cannot map the windows cached")]
    NotCached,
    /// The descriptor is not understood.
    #[error("the guest's driver does not understand the view; is it as new as this broker?")]
    Invalid,
    /// Something else.
    #[error("the guest's driver complains with the unknown number {0:#x}")]
    Unknown(u32),
}

impl Complaint {
    fn from_raw(number: u32) -> Option<Self> {
        Some(match number {
            0 => return None,
            COMPLAINT_NO_ADDRESS => Self::NoAddress,
            COMPLAINT_NOT_CACHED => Self::NotCached,
            COMPLAINT_INVALID => Self::Invalid,
            other => Self::Unknown(other),
        })
    }
}

impl Pages {
    /// The pages of a view of so many slots; `descriptor` tells everything but the generation.
    pub fn new(
        descriptor: Descriptor,
        ranges: Vec<WindowRange>,
        slots: usize,
    ) -> Result<Self, Errno> {
        let descriptor = Descriptor { generation: FIRST_GENERATION, ..descriptor };
        let files = (0..slots).map(|_| page().map(Arc::new)).collect::<Result<Vec<_>, Errno>>()?;
        let pages = Self { files, descriptor, ranges };
        let mut first = [0; SIZE];
        pages.descriptor.write(&pages.ranges, &mut first);
        for (number, file) in (0u32..).zip(&pages.files) {
            let mut bytes = [0; SIZE];
            if number == 0 {
                bytes = first;
            } else {
                // Magic, version and the length of a range; the digest.
                copy(&mut bytes, &first, 0..16);
                copy(&mut bytes, &first, 32..64);
            }
            put(&mut bytes, SLOT_AT, &number.to_le_bytes());
            write(file, &bytes, 0)?;
        }
        Ok(pages)
    }

    /// The file of each slot's page.
    pub fn files(&self) -> &[Arc<OwnedFd>] {
        &self.files
    }

    /// The view's flags, `FLAG_*` of the ABI.
    pub fn flags(&self) -> u32 {
        self.descriptor.flags
    }

    /// The target's instance from the next [`Pages::set_state`] on.
    pub fn set_instance(&mut self, instance: u64) {
        self.descriptor.instance = instance;
    }

    /// Says the view's state from now on, `STATE_*` of the ABI, with a new generation.
    pub fn set_state(&mut self, state: u32) -> Result<(), Errno> {
        let Some(file) = self.files.first() else { return Ok(()) };
        let old = self.descriptor.generation;
        self.descriptor.state = state;
        self.descriptor.generation = old + 2;
        let mut bytes = [0; SIZE];
        self.descriptor.write(&self.ranges, &mut bytes);
        for (at, bytes) in changes(&bytes, u8_of(old)) {
            write(file, &bytes, at)?;
        }
        Ok(())
    }

    /// Whether the guest's driver has acted upon the last change.
    pub fn is_seen(&self) -> bool {
        let mut seen = [0; 8];
        self.read(SEEN_AT, &mut seen) && u64::from_le_bytes(seen) >= self.descriptor.generation
    }

    /// What the guest's driver finds wrong.
    pub fn complaint(&self) -> Option<Complaint> {
        let mut number = [0; 4];
        self.read(COMPLAINT_AT, &mut number).then_some(())?;
        Complaint::from_raw(u32::from_le_bytes(number))
    }

    fn read(&self, at: usize, bytes: &mut [u8]) -> bool {
        let Some(file) = self.files.first() else { return false };
        rustix::io::pread(file, &mut *bytes, at as u64) == Ok(bytes.len())
    }
}

/// The writes that make a page say something else, in order, each with its place.
///
/// Only the generation and the state change, and by one write while the generation is odd: the
/// guest can use nothing of the view meanwhile, and this process may be stopped between any two
/// writes. What the guest may have written over the rest is put right before that. A byte is
/// written at once, more perhaps not: the lowest one alone makes the generation odd and even again.
fn changes(page: &[u8; SIZE], old: u8) -> [(usize, Vec<u8>); 7] {
    let part = |part: std::ops::Range<usize>| {
        (part.start, page.get(part).map(<[u8]>::to_vec).unwrap_or_default())
    };
    [
        part(0..GENERATION_AT),
        part(STATE_END..SEEN_AT),
        part(SEEN_AT + 8..COMPLAINT_AT),
        part(COMPLAINT_AT + 4..SIZE),
        (GENERATION_AT, vec![old | 1]),
        part(GENERATION_AT + 1..STATE_END),
        part(GENERATION_AT..GENERATION_AT + 1),
    ]
}

/// A page that cannot change its size.
fn page() -> Result<OwnedFd, Errno> {
    let file = rustix::fs::memfd_create(
        "kvmmem-descriptor",
        MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::NOEXEC_SEAL,
    )
    .or_else(|error| match error {
        // Before Linux 6.3.
        Errno::INVAL => rustix::fs::memfd_create(
            "kvmmem-descriptor",
            MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING,
        ),
        error => Err(error),
    })?;
    rustix::fs::ftruncate(&file, PAGE_SIZE)?;
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)?;
    Ok(file)
}

pub(super) fn write(file: &OwnedFd, mut bytes: &[u8], at: usize) -> Result<(), Errno> {
    let mut at = at as u64;
    while !bytes.is_empty() {
        let count = match rustix::io::pwrite(file, bytes, at) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => count,
            Err(Errno::INTR) => 0,
            Err(error) => return Err(error),
        };
        bytes = bytes.get(count..).unwrap_or_default();
        at += count as u64;
    }
    Ok(())
}

fn put(page: &mut [u8; SIZE], at: usize, bytes: &[u8]) {
    if let Some(place) = page.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

fn copy(to: &mut [u8; SIZE], from: &[u8; SIZE], part: std::ops::Range<usize>) {
    if let (Some(to), Some(from)) = (to.get_mut(part.clone()), from.get(part)) {
        to.copy_from_slice(from);
    }
}

/// The lowest byte.
fn u8_of(number: u64) -> u8 {
    number.to_le_bytes()[0]
}

#[cfg(test)]
mod tests {
    use kvmmem_abi::descriptor::{DescriptorError, MAGIC, MAX_RANGES};
    use kvmmem_abi::native::{RIGHT_READ, STATE_GONE, STATE_OPEN, STATE_REVOKED};
    use proptest::prelude::*;

    use super::*;

    fn pages(slots: usize) -> Pages {
        let descriptor = Descriptor {
            state: STATE_OPEN,
            rights: RIGHT_READ,
            token_digest: [0xd1; 32],
            uuid: [0x1d; 16],
            instance: 5,
            ..Descriptor::default()
        };
        let range = WindowRange { gpa: 0x1000, len: 0x2000, offset: 0, window: 1 };
        Pages::new(descriptor, vec![range], slots).unwrap()
    }

    fn bytes(pages: &Pages, slot: usize) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        assert_eq!(rustix::io::pread(&pages.files()[slot], &mut bytes, 0), Ok(SIZE));
        bytes
    }

    fn read(pages: &Pages) -> Result<Descriptor, DescriptorError> {
        Descriptor::read(&bytes(pages, 0), &mut [WindowRange::default(); MAX_RANGES], |_| {
            Some(0x2000)
        })
    }

    #[test]
    fn a_driver_reads_what_was_written() {
        let mut pages = pages(2);
        assert!(!pages.is_seen());
        let first = read(&pages).unwrap();
        assert_eq!((first.generation, first.state, first.range_count), (2, STATE_OPEN, 1));
        assert_eq!(first.instance, 5);
        pages.set_instance(6);
        pages.set_state(STATE_REVOKED).unwrap();
        let second = read(&pages).unwrap();
        assert_eq!(second.instance, 6);
        assert_eq!(
            (second.generation, second.state, second.token_digest),
            (4, STATE_REVOKED, [0xd1; 32])
        );
        assert_eq!(rustix::fs::fstat(&pages.files()[1]).unwrap().st_size, 4096);
        assert_eq!(pages.files().len(), 2);
    }

    #[test]
    fn further_pages_carry_the_digest_and_their_number_alone() {
        let pages = pages(3);
        let page = bytes(&pages, 2);
        let mut expected = [0; SIZE];
        put(&mut expected, 0, &MAGIC.to_le_bytes());
        put(&mut expected, 8, &1u32.to_le_bytes());
        put(&mut expected, 12, &32u32.to_le_bytes());
        put(&mut expected, 32, &[0xd1; 32]);
        put(&mut expected, SLOT_AT, &2u32.to_le_bytes());
        assert!(page == expected);
    }

    #[test]
    fn a_reader_finds_the_old_state_or_the_new_one_or_a_single_moment_of_change() {
        let old = Descriptor {
            generation: 254,
            state: STATE_OPEN,
            rights: RIGHT_READ,
            ..Descriptor::default()
        };
        let new = Descriptor { generation: 256, state: STATE_REVOKED, ..old };
        let range = [WindowRange { gpa: 0x1000, len: 0x2000, offset: 0, window: 1 }];
        let [mut page, mut target] = [[0; SIZE]; 2];
        old.write(&range, &mut page);
        new.write(&range, &mut target);
        let mut seen = Vec::new();
        for (at, bytes) in changes(&target, 254) {
            put(&mut page, at, &bytes);
            let read = Descriptor::read(&page, &mut [WindowRange::default(); MAX_RANGES], |_| {
                Some(0x2000)
            });
            seen.push(read.map(|read| (read.generation, read.state)));
        }
        let [old, new] = [Ok((254, STATE_OPEN)), Ok((256, STATE_REVOKED))];
        // One write while it changes, between the one that begins and the one that ends that.
        let changing = Err(DescriptorError::Changing);
        assert_eq!(seen, [old, old, old, old, changing, changing, new]);
        assert_eq!(page, target);
    }

    #[test]
    fn the_drivers_numbers_stay_and_count() {
        let mut pages = pages(1);
        let write = |at: usize, bytes: &[u8]| {
            rustix::io::pwrite(&pages.files()[0], bytes, at as u64).unwrap();
        };
        write(SEEN_AT, &2u64.to_le_bytes());
        write(COMPLAINT_AT, &COMPLAINT_NO_ADDRESS.to_le_bytes());
        assert!(pages.is_seen());
        assert_eq!(pages.complaint(), Some(Complaint::NoAddress));
        pages.set_state(STATE_GONE).unwrap();
        assert!(!pages.is_seen());
        assert_eq!(pages.complaint(), Some(Complaint::NoAddress));
        let bytes = bytes(&pages, 0);
        assert_eq!(bytes[SEEN_AT..SEEN_AT + 8], 2u64.to_le_bytes());
    }

    proptest! {
        #[test]
        fn whatever_a_guest_writes_the_next_change_is_right(garbage in proptest::collection::vec(any::<u8>(), SIZE), generations in 0usize..300) {
            let mut pages = pages(1);
            for _ in 0..generations {
                pages.set_state(STATE_OPEN).unwrap();
            }
            rustix::io::pwrite(&pages.files()[0], &garbage, 0).unwrap();
            let _ = (pages.is_seen(), pages.complaint());
            pages.set_state(STATE_GONE).unwrap();
            let read = read(&pages).unwrap();
            prop_assert_eq!((read.state, read.generation), (STATE_GONE, 4 + 2 * generations as u64));
        }
    }
}
