// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Searches of foreign memory in place.

use super::access::copied;
use super::{Foreign, ForeignError};
use crate::guarded;
use crate::search::{Atoms, Candidates, PLACES, Probe};

/// Bytes for which one block of candidates is few.
const DENSE: u64 = 4096;

/// Blocks of candidates that are few in any memory.
const FEW: u64 = 16;

/// Bytes behind the first one of an atom.
const BEHIND: usize = Atoms::LEN - 1;

/// Bytes of write-combining memory that are copied at once to be searched, at first and at most: a
/// search is often over soon, and begun again behind what was found.
const COPIED: (usize, usize) = (4 << 10, 64 << 10);

impl Foreign {
    /// The first block of [`PLACES`] from `offset` on, among `places` of them, at which `probe` is
    /// found. All of them must have what the probe [reaches](Probe::reach) behind them. The
    /// other machine may change what was found at any moment, and what was not: only a copy can
    /// tell what is there.
    ///
    /// # Errors
    /// [`ForeignError`].
    pub fn find(
        &self,
        probe: &Probe,
        offset: u64,
        places: u64,
    ) -> Result<Option<Candidates>, ForeignError> {
        let outside = ForeignError::Outside { offset, len: usize::MAX, size: self.len() };
        let distance = probe.reach();
        let mut left = usize::try_from(places).map_err(|_| outside)?;
        let mut at = self.check(offset, left.checked_add(distance).ok_or(outside)?)?;
        if self.is_write_combining {
            let end = offset + left as u64 + distance as u64;
            let find = |copy: &[u8]| probe.find(copy, 0);
            let found = self.find_in_copies(offset, end, distance, find)?;
            return Ok(found.map(|(start, found)| Candidates { at: start + found.at, ..found }));
        }
        while left > 0 {
            let blocks = left - left % PLACES;
            // SAFETY: the places and what the probe reaches behind them lie within this object's
            // mapping, as checked above, which is readable and stays until this object
            // is dropped. `check` has prepared the thread.
            let (rest, found) = unsafe { probe.find_blocks(self.pointer(at), blocks) };
            at += blocks - rest;
            left -= blocks - rest;
            if found != 0 {
                return Ok(Some(Candidates { at: at as u64, places: found }));
            }
            // Fewer than a block, or a block that is not there: a copy tells up to where.
            let places = left.min(PLACES);
            let mut copy = [0; PLACES + u8::MAX as usize];
            let copy = copy.get_mut(..places + distance).unwrap_or_default();
            self.read(at as u64, copy)?;
            let found = probe.find_some(copy, places);
            if found != 0 {
                return Ok(Some(Candidates { at: at as u64, places: found }));
            }
            at += places;
            left -= places;
        }
        Ok(None)
    }

    /// Whether one of the atoms may lie in the `len` bytes from `offset` on: `false` where none
    /// did, `true` where one does, or bytes that resemble one are so frequent that it is cheaper
    /// not to know. Always `true` on a processor without AVX2.
    ///
    /// # Errors
    /// [`ForeignError`].
    pub fn may_hold(&self, atoms: &Atoms, offset: u64, len: u64) -> Result<bool, ForeignError> {
        let outside = ForeignError::Outside { offset, len: usize::MAX, size: self.len() };
        let mut left = usize::try_from(len).map_err(|_| outside)?;
        let mut at = self.check(offset, left)?;
        let mut few = len / DENSE + FEW;
        if self.is_write_combining {
            let find = |copy: &[u8]| atoms.may_be_in(copy, &mut few).then_some(());
            return Ok(self.find_in_copies(offset, offset + len, BEHIND, find)?.is_some());
        }
        while left > 0 && !atoms.is_empty() {
            let places = left.saturating_sub(BEHIND);
            let blocks = places - places % PLACES;
            // SAFETY: the places and the three bytes behind the last one lie within this object's
            // mapping, as checked above, which is readable and stays until this object is dropped.
            // `check` has prepared the thread.
            let Some((rest, found)) = (unsafe { atoms.find_blocks(self.pointer(at), blocks) })
            else {
                return Ok(true);
            };
            at += blocks - rest;
            left -= blocks - rest;
            // The block with candidates, one that is not there, or what is left at the end.
            let mut copy = [0; PLACES + BEHIND];
            let copy = copy.get_mut(..left.min(PLACES + BEHIND)).unwrap_or_default();
            self.read(at as u64, copy)?;
            let places = copy.len().min(PLACES);
            let is_candidate = |place: &usize| found == 0 || found >> place & 1 != 0;
            let mut places_of = (0..places).filter(is_candidate);
            if places_of.any(|place| atoms.is_at(copy.get(place..).unwrap_or_default())) {
                return Ok(true);
            }
            if rest > 0 {
                if few == 0 {
                    return Ok(true);
                }
                few -= 1;
            }
            at += places;
            left -= places;
        }
        Ok(false)
    }

    /// What `find` finds first in copies of what is from `offset` to `end`, which lie within, and
    /// where its copy begins. The last `behind` bytes of a copy are the first ones of the next.
    fn find_in_copies<T>(
        &self,
        offset: u64,
        end: u64,
        behind: usize,
        mut find: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<Option<(u64, T)>, ForeignError> {
        let (mut size, most) = COPIED;
        let mut copy = vec![0; most + behind];
        let mut at = offset;
        while at < end {
            let left = usize::try_from(end - at).unwrap_or(usize::MAX);
            let part = copy.get_mut(..left.min(size + behind)).unwrap_or_default();
            self.read(at, part)?;
            if let Some(found) = find(part) {
                return Ok(Some((at, found)));
            }
            at += size as u64;
            size = (size * 2).min(most);
        }
        Ok(None)
    }

    /// Loads every byte of `len` from `offset` on, a multiple of 128, and forgets it, as fast as
    /// the machine does: what searches are measured against. `None` on a processor without
    /// AVX2.
    ///
    /// # Errors
    /// [`ForeignError`].
    pub fn sweep(&self, offset: u64, len: usize) -> Result<Option<()>, ForeignError> {
        let len = len - len % 128;
        let at = self.check(offset, len)?;
        // SAFETY: the range lies within this object's mapping, as checked above, which is readable
        // and stays until this object is dropped; `check` has prepared the thread.
        match unsafe { guarded::sweep(self.pointer(at), len) } {
            Some(left) => copied(offset, len, left).map(Some),
            None => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;

    use super::*;
    use crate::guarded::STREAM_MIN;
    use crate::search::MaskedByte;

    const SIZE: u64 = 0x4000;

    fn memory() -> (File, Foreign) {
        let file =
            File::from(rustix::fs::memfd_create("find", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        file.set_len(SIZE).unwrap();
        let memory = Foreign::reserve(SIZE, 0, true, 0x1000).unwrap();
        memory.place(0, SIZE, file.as_fd(), 0).unwrap();
        (file, memory)
    }

    fn pair(distance: u8) -> Probe {
        let [first, second] = [b'a', b'b'].map(|value| MaskedByte { value, mask: 0xff });
        Probe::new(first, (second, distance), (second, distance)).unwrap()
    }

    #[test]
    fn candidates_are_found_at_all_places_and_not_beyond() {
        let (_file, memory) = memory();
        all_candidates(&memory);
        all_candidates(&memory.write_combining());
    }

    fn all_candidates(memory: &Foreign) {
        let pair = pair(7);
        for place in [0, 1, 63, 64, 0xfff, 0x1000, 0x3ff0, SIZE - 8] {
            memory.write(place, b"a").unwrap();
            memory.write(place + 7, b"b").unwrap();
            for from in [0, place, place.saturating_sub(100)] {
                let found = memory.find(&pair, from, SIZE - 7 - from).unwrap().unwrap();
                assert_eq!(found.iter().collect::<Vec<_>>(), [place], "{from:#x}");
            }
            assert_eq!(memory.find(&pair, 0, place).unwrap(), None);
            memory.write(place, &[0; 8]).unwrap();
        }
        assert_eq!(memory.find(&pair, 0, SIZE - 7).unwrap(), None);
        assert!(matches!(memory.find(&pair, 0, SIZE - 6), Err(ForeignError::Outside { .. })));
        assert!(matches!(memory.find(&pair, 8, u64::MAX), Err(ForeignError::Outside { .. })));
        assert!(memory.sweep(0, 0x4000).is_ok() && memory.sweep(1, 0x4000).is_err());
    }

    fn atoms(texts: &[&[u8]]) -> Atoms {
        let pattern = |text: &&[u8]| {
            text.iter().map(|value| MaskedByte { value: *value, mask: 0xff }).collect()
        };
        Atoms::new(texts.iter().map(pattern)).unwrap()
    }

    #[test]
    fn atoms_are_found_at_all_places_and_not_beyond() {
        let (_file, memory) = memory();
        all_atoms(&memory);
        all_atoms(&memory.write_combining());
    }

    fn all_atoms(memory: &Foreign) {
        let atoms = atoms(&[b"ab", b"cdef", b"xyz"]);
        for text in [&b"ab"[..], b"cdef", b"xyz"] {
            for place in [0, 1, 62, 63, 64, 0xfff, 0x1000, 0x3fbd, SIZE - text.len() as u64] {
                memory.write(place, text).unwrap();
                let end = place + text.len() as u64;
                for (from, to) in [(0, SIZE), (place, end), (place.saturating_sub(100), end)] {
                    assert!(
                        memory.may_hold(&atoms, from, to - from).unwrap(),
                        "{from:#x} {end:#x}"
                    );
                }
                // Not one of which a part is there alone.
                assert!(!memory.may_hold(&atoms, 0, end - 1).unwrap(), "{place:#x}");
                assert!(!memory.may_hold(&atoms, place + 1, SIZE - place - 1).unwrap());
                memory.write(place, &[0; 4][..text.len()]).unwrap();
            }
        }
        assert!(!memory.may_hold(&atoms, 0, SIZE).unwrap());
        assert!(!memory.may_hold(&Atoms::new([]).unwrap(), 0, SIZE).unwrap());
        let outside = memory.may_hold(&atoms, 1, SIZE);
        assert!(matches!(outside, Err(ForeignError::Outside { .. })));
    }

    #[test]
    fn bytes_that_resemble_atoms_are_given_up_where_they_are_many() {
        let (_file, memory) = memory();
        let texts: Vec<[u8; 4]> =
            (0..16).map(|half| [0x40, 0x50, 0x60, 0x70].map(|byte| byte | half)).collect();
        let atoms = atoms(&texts.iter().map(|text| &text[..]).collect::<Vec<_>>());
        for at in 0..SIZE / 4 {
            let (half, other) = ((at % 16).to_le_bytes()[0], (at / 16 % 15).to_le_bytes()[0]);
            let other = if other < half { other } else { other + 1 };
            let word = [0x40 | half, 0x50 | other, 0x60 | half, 0x70 | other];
            memory.write(at * 4, &word).unwrap();
        }
        assert!(memory.may_hold(&atoms, 0, SIZE).unwrap());
        assert!(!memory.may_hold(&atoms, 0, 0x200).unwrap());
    }

    #[test]
    fn large_copies_end_at_the_byte_that_is_lost() {
        let file =
            File::from(rustix::fs::memfd_create("copy", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        let size = 4 * STREAM_MIN as u64;
        file.set_len(size).unwrap();
        let memory = Foreign::reserve(size, 0, true, 0x1000).unwrap();
        memory.place(0, size, file.as_fd(), 0).unwrap();
        let bytes: Vec<u8> = (0..size).map(|at| (at * 7 / 3).to_le_bytes()[0]).collect();
        memory.write(0, &bytes).unwrap();
        let mut copy = vec![0; bytes.len()];
        for (from, to) in [(0, bytes.len()), (1, bytes.len() - 1), (5, 5 + STREAM_MIN)] {
            let copy = &mut copy[..to - from];
            memory.read(from as u64, copy).unwrap();
            assert!(copy == &bytes[from..to], "{from}..{to}");
        }
        file.set_len(size / 2).unwrap();
        copy.fill(0);
        let lost = memory.read(3, &mut copy[3..]);
        assert_eq!(lost, Err(ForeignError::Lost { offset: size / 2 }));
        let there = bytes.len() / 2;
        assert!(copy[3..there] == bytes[3..there]);
    }

    #[test]
    fn what_is_released_is_there_still() {
        let (file, memory) = memory();
        memory.write(0x1ff0, b"ab").unwrap();
        memory.populate(0, SIZE).unwrap();
        memory.release(0, 0x2000).unwrap();
        memory.release(0x1000, SIZE - 0x1000).unwrap();
        let found = memory.find(&pair(1), 0, SIZE - 1).unwrap().unwrap();
        assert_eq!(found.iter().collect::<Vec<_>>(), [0x1ff0]);
        for act in [Foreign::populate, Foreign::release] {
            assert_eq!(act(&memory, 0x1000, SIZE), Err(rustix::io::Errno::INVAL));
            assert_eq!(act(&memory, u64::MAX, 2), Err(rustix::io::Errno::INVAL));
            assert!(act(&memory, 0x10, 0x1000).is_err());
        }
        // What is gone is an error, no signal.
        file.set_len(0x1000).unwrap();
        assert!(memory.populate(0, SIZE).is_err());
    }

    #[test]
    fn memory_that_vanishes_is_lost_to_the_byte() {
        let (file, memory) = memory();
        memory.write(0x1ff0, b"a").unwrap();
        file.set_len(0x2000).unwrap();
        for distance in [0, 1, 20, 255] {
            let lost = Err(ForeignError::Lost { offset: 0x2000 });
            assert_eq!(memory.find(&pair(distance), 0, SIZE - 255), lost);
            assert_eq!(memory.find(&pair(distance), 0x1fff, 10), lost);
        }
        let lost = Err(ForeignError::Lost { offset: 0x2000 });
        assert_eq!(memory.may_hold(&atoms(&[b"bcd"]), 0, SIZE), lost);
        assert_eq!(memory.may_hold(&atoms(&[b"bcd"]), 0x1ff0, 100), lost);
        // What lies before is found.
        memory.write(0x1f00, b"ab").unwrap();
        let found = memory.find(&pair(1), 0, SIZE - 255).unwrap().unwrap();
        assert_eq!(found.iter().collect::<Vec<_>>(), [0x1f00]);
        assert!(matches!(memory.sweep(0, 0x4000), Err(ForeignError::Lost { .. }) | Ok(None)));
    }
}
