// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Looking at foreign memory where it is.

use super::{Foreign, ForeignError, copied};
use crate::guarded;
use crate::search::{Candidates, PLACES, Probe};

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
    use crate::search::Masked;

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
        let [first, second] = [b'a', b'b'].map(|value| Masked { value, mask: 0xff });
        Probe::new(first, (second, distance), (second, distance)).unwrap()
    }

    #[test]
    fn candidates_are_found_at_all_places_and_not_beyond() {
        let (_file, memory) = memory();
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
        // What lies before is found.
        memory.write(0x1f00, b"ab").unwrap();
        let found = memory.find(&pair(1), 0, SIZE - 255).unwrap().unwrap();
        assert_eq!(found.iter().collect::<Vec<_>>(), [0x1f00]);
        assert!(matches!(memory.sweep(0, 0x4000), Err(ForeignError::Lost { .. }) | Ok(None)));
    }
}
