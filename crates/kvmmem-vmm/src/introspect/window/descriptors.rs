// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Descriptor pages of views: one memory file, which the guest reads through a read-only memory
//! slot.
//!
//! The format is [`kvmmem_abi::descriptor`].

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use kvm_ioctls::VmFd;
use kvmmem_abi::descriptor::{Descriptor, GENERATION_AT, SIZE, WindowRange};
use kvmmem_sys::memslot::{Memslot, SlotError};
use kvmmem_sys::ram::PAGE_SIZE;
use kvmmem_sys::window::{Access, GuestMapping, MappingError, memory_file};

/// The most views that a machine has open at once: as many pages are there.
pub(crate) const MAX_VIEWS: usize = 64;

/// Length in bytes of all pages.
pub(crate) const PAGES_LEN: u64 = MAX_VIEWS as u64 * PAGE_SIZE;

/// Eight bytes are stored at a time.
const WORDS_PER_PAGE: usize = 512;
const GENERATION_WORD: usize = GENERATION_AT / 8;
const _: () = assert!(WORDS_PER_PAGE as u64 * 8 == PAGE_SIZE);
const _: () = assert!(SIZE.is_multiple_of(8) && GENERATION_AT.is_multiple_of(8));

/// Why the descriptor pages could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorsError {
    /// The host gave no memory for them.
    #[error("cannot make the views' descriptor pages")]
    Memory(#[source] MappingError),
    /// KVM refused to show them to the guest.
    #[error("cannot show the views' descriptor pages to the guest")]
    Show(#[source] SlotError),
}

/// All pages.
pub(crate) struct Descriptors {
    gpa: u64,
    file: File,
    /// Writable, and not the one that the guest has.
    mapping: GuestMapping,
    /// Even; each page keeps its own over the views that follow each other on it, so that a guest
    /// that slept through a change of views sees a higher one.
    generations: [u64; MAX_VIEWS],
}

impl Descriptors {
    /// Pages without views, to be shown at `gpa`.
    pub(crate) fn new(gpa: u64) -> Result<Self, DescriptorsError> {
        let file =
            memory_file("kvmmem-descriptors", PAGES_LEN).map_err(DescriptorsError::Memory)?;
        let mapping = GuestMapping::of_file(file.as_fd(), 0, PAGES_LEN, Access::ReadWrite)
            .map_err(DescriptorsError::Memory)?;
        Ok(Self { gpa, file, mapping, generations: [0; MAX_VIEWS] })
    }

    /// Shows the pages to the guest of `vm`, by KVM's slot number `slot`, as long as the result
    /// lives.
    pub(crate) fn show(&self, vm: &Arc<VmFd>, slot: u32) -> Result<Memslot, DescriptorsError> {
        let mapping = GuestMapping::of_file(self.file.as_fd(), 0, PAGES_LEN, Access::ReadOnly)
            .map_err(DescriptorsError::Memory)?;
        Memslot::add(vm, slot, self.gpa, mapping).map_err(DescriptorsError::Show)
    }

    /// GPA of page `index`.
    pub(crate) fn gpa(&self, index: usize) -> u64 {
        self.gpa + index as u64 * PAGE_SIZE
    }

    /// The page whose GPA is `gpa`.
    pub(crate) fn index(&self, gpa: u64) -> Option<usize> {
        let within = gpa.checked_sub(self.gpa).filter(|within| within.is_multiple_of(PAGE_SIZE))?;
        usize::try_from(within / PAGE_SIZE).ok().filter(|index| *index < MAX_VIEWS)
    }

    /// Writes page `index`, under the next generation, which `content` need not know.
    pub(crate) fn write(&mut self, index: usize, content: &Descriptor, ranges: &[WindowRange]) {
        let mut bytes = [0; SIZE];
        content.write(ranges, &mut bytes);
        self.publish(index, &bytes);
    }

    /// Makes page `index` one without a view.
    pub(crate) fn clear(&mut self, index: usize) {
        self.publish(index, &[0; SIZE]);
    }

    /// A reader that sees an even generation, any of `bytes`, and the same generation again, has
    /// seen nothing of the page before or behind `bytes`: the stores below become visible in
    /// their order.
    fn publish(&mut self, index: usize, bytes: &[u8; SIZE]) {
        let Some(generation) = self.generations.get_mut(index) else {
            return;
        };
        let base = index * WORDS_PER_PAGE;
        let (changing, changed) = (*generation + 1, *generation + 2);
        *generation = changed;
        self.mapping.store_word(base + GENERATION_WORD, changing);
        fence(Ordering::SeqCst);
        for (word, value) in bytes.as_chunks::<8>().0.iter().enumerate() {
            if word != GENERATION_WORD {
                self.mapping.store_word(base + word, u64::from_le_bytes(*value));
            }
        }
        fence(Ordering::SeqCst);
        self.mapping.store_word(base + GENERATION_WORD, changed);
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::AtomicBool;

    use kvmmem_abi::descriptor::MAX_RANGES;
    use kvmmem_abi::native::{RIGHT_READ, STATE_OPEN};

    use super::*;

    fn page(file: &File, index: usize) -> [u8; SIZE] {
        let mut bytes = [0; SIZE];
        file.read_exact_at(&mut bytes, index as u64 * PAGE_SIZE).unwrap();
        bytes
    }

    fn read(bytes: &[u8; SIZE]) -> Option<(Descriptor, Vec<WindowRange>)> {
        let mut ranges = [WindowRange::default(); MAX_RANGES];
        let descriptor = Descriptor::read(bytes, &mut ranges, |_| None).ok()?;
        Some((descriptor, ranges[..descriptor.range_count].to_vec()))
    }

    /// A view all of whose numbers come from `number`.
    fn numbered(number: u64) -> (Descriptor, Vec<WindowRange>) {
        let [byte, ..] = number.to_le_bytes();
        let count = usize::try_from(number % 60).unwrap() + 1;
        let ranges: Vec<WindowRange> = (0..count as u64)
            .map(|index| WindowRange {
                gpa: (index * 8 + number % 8) << 12,
                len: 4096,
                offset: number << 12,
                window: 0,
            })
            .collect();
        let content = Descriptor {
            generation: 0,
            state: STATE_OPEN,
            rights: RIGHT_READ,
            token_digest: [byte; 32],
            uuid: [byte; 16],
            window_gpa: number << 12,
            window_len: (number + 1) << 12,
            range_count: count,
            flags: 0,
            instance: number,
        };
        (content, ranges)
    }

    #[test]
    fn pages_are_found_by_their_gpa_and_keep_to_themselves() {
        let mut descriptors = Descriptors::new(1 << 32).unwrap();
        let (content, ranges) = numbered(5);
        descriptors.write(63, &content, &ranges);
        let gpa = descriptors.gpa(63);
        assert_eq!(descriptors.index(gpa), Some(63));
        for bad in [gpa + 1, gpa + 4096, (1 << 32) - 4096, 0, u64::MAX] {
            assert_eq!(descriptors.index(bad), None, "{bad:#x}");
        }
        assert_eq!(
            read(&page(&descriptors.file, 63)),
            Some((Descriptor { generation: 2, ..content }, ranges))
        );
        assert_eq!(page(&descriptors.file, 62), [0; SIZE]);
        descriptors.clear(63);
        assert_eq!(read(&page(&descriptors.file, 63)), None);
        descriptors.write(63, &content, &[]);
        assert_eq!(read(&page(&descriptors.file, 63)).unwrap().0.generation, 6);
        // No such page: no effect, no panic.
        descriptors.write(64, &content, &[]);
    }

    #[test]
    fn a_reader_sees_whole_pages_of_rising_generations() {
        let mut descriptors = Descriptors::new(1 << 32).unwrap();
        let file = descriptors.file.try_clone().unwrap();
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let reader = scope.spawn(|| {
                let (mut last, mut seen) = (0, 0);
                while !done.load(Ordering::SeqCst) {
                    let (before, copy, after) = (page(&file, 1), page(&file, 1), page(&file, 1));
                    let generation =
                        |bytes: &[u8; SIZE]| bytes[GENERATION_AT..GENERATION_AT + 8].to_vec();
                    if generation(&before) != generation(&copy)
                        || generation(&copy) != generation(&after)
                    {
                        continue;
                    }
                    let Some((content, ranges)) = read(&copy) else { continue };
                    let (expected, its_ranges) = numbered(content.window_gpa >> 12);
                    assert_eq!(content, Descriptor { generation: content.generation, ..expected });
                    assert_eq!(ranges, its_ranges);
                    assert!(content.generation >= last);
                    (last, seen) = (content.generation, seen + 1);
                }
                seen
            });
            for number in 1..100_000 {
                let (content, ranges) = numbered(number % 251 + 1);
                descriptors.write(1, &content, &ranges);
            }
            done.store(true, Ordering::SeqCst);
            assert!(reader.join().unwrap() > 0);
        });
    }
}
