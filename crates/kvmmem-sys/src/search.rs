// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pattern search: compares three bytes of a pattern at many places at a time.
//!
//! A search of a target's memory does this in place
//! ([`Foreign::find`](crate::foreign::Foreign::find)) and copies only candidates.

mod atoms;
mod byte;

pub use atoms::Atoms;
pub use byte::MaskedByte;

use crate::guarded::{self, BLOCK, Distances, Vector, Vectors};

/// Places that are looked at together.
pub const PLACES: usize = BLOCK;

/// Three bytes of a pattern and how far they are apart.
#[derive(Clone, Debug)]
pub struct Probe {
    vectors: Vectors,
    distances: Distances,
}

/// Places where a pair was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Candidates {
    /// The first place of the block.
    pub at: u64,
    /// Bit n is set for place `at + n`; not 0.
    pub places: u64,
}

impl Candidates {
    /// The places, ascending.
    pub fn iter(self) -> impl Iterator<Item = u64> {
        (0..u64::BITS)
            .filter(move |bit| self.places >> bit & 1 != 0)
            .map(move |bit| self.at + u64::from(bit))
    }
}

impl Probe {
    /// `second` and `third` follow `first` at these distances, of which the third is not the
    /// smaller one (`None`). Where there are fewer bytes, some are given again.
    pub fn new(
        first: MaskedByte,
        (second, second_at): (MaskedByte, u8),
        (third, third_at): (MaskedByte, u8),
    ) -> Option<Self> {
        let vector = |byte: MaskedByte| Vector {
            value: [byte.value & byte.mask; 32],
            mask: [byte.mask; 32],
        };
        let vectors = [first, second, third].map(vector);
        Some(Self { vectors: Vectors(vectors), distances: Distances::new(second_at, third_at)? })
    }

    /// How far the last byte is behind the first one.
    pub fn reach(&self) -> usize {
        self.distances.third()
    }

    /// The first block of candidates in `memory`, from place `from` on.
    pub fn find(&self, memory: &[u8], from: usize) -> Option<Candidates> {
        let end = memory.len().saturating_sub(self.reach());
        let places = end.checked_sub(from)?;
        let blocks = places - places % BLOCK;
        let rest = memory.get(from..)?;
        // SAFETY: `rest` has `places` and what the probe reaches, so that many bytes may be loaded.
        // They are this program's own and do not vanish, so that it does not matter whether
        // the thread is prepared for SIGBUS.
        let (left, found) = unsafe { self.find_blocks(rest.as_ptr(), blocks) };
        if found != 0 {
            return Some(Candidates { at: (from + blocks - left) as u64, places: found });
        }
        let found = self.find_some(memory.get(from + blocks..)?, places - blocks);
        (found != 0).then_some(Candidates { at: (from + blocks) as u64, places: found })
    }

    /// [`guarded::find`].
    ///
    /// # Safety
    /// As there; what the probe reaches is the third byte's distance.
    pub(crate) unsafe fn find_blocks(&self, from: *const u8, places: usize) -> (usize, u64) {
        // SAFETY: the caller's.
        unsafe { guarded::find(&self.vectors, self.distances, from, places) }
    }

    /// Which of the first `places`, at most [`PLACES`], match.
    pub(crate) fn find_some(&self, memory: &[u8], places: usize) -> u64 {
        let distances = [0, self.distances.second(), self.distances.third()];
        let is_match = |place: &usize| {
            self.vectors.0.iter().zip(distances).all(|(Vector { value, mask }, distance)| {
                memory.get(place + distance).is_some_and(|byte| byte & mask[0] == value[0])
            })
        };
        (0..places).filter(is_match).fold(0, |all, place| all | 1 << place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All candidates, block by block.
    fn all(probe: &Probe, memory: &[u8], mut from: usize) -> Vec<u64> {
        let mut all = Vec::new();
        while let Some(found) = probe.find(memory, from) {
            all.extend(found.iter());
            from = usize::try_from(found.at).unwrap() + PLACES;
        }
        all
    }

    #[test]
    fn candidates_are_those_of_a_plain_search() {
        // Few values, so that there are many candidates; a small generator, so that it is the same
        // each time.
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            u8::try_from(state >> 24).unwrap()
        };
        for len in [0usize, 1, 63, 64, 65, 128, 200, 1000] {
            let memory: Vec<u8> = (0..len).map(|_| next() & 0x8f).collect();
            for (second, third) in
                [(0u8, 0u8), (0, 1), (1, 5), (5, 5), (63, 64), (7, 255), (255, 255)]
            {
                for mask in [0xff, 0x0f, 0xf0] {
                    let byte = |value, mask| MaskedByte { value, mask };
                    let others = ((byte(0x07, 0x03), second), (byte(0x01, 0x01), third));
                    let probe = Probe::new(byte(0x83, mask), others.0, others.1).unwrap();
                    for from in [0, 1, 64, 70] {
                        let plain: Vec<u64> = (from..len.saturating_sub(third.into()))
                            .filter(|at| memory[*at] & mask == 0x83 & mask)
                            .filter(|at| memory[at + usize::from(second)] & 0x03 == 0x03)
                            .filter(|at| memory[at + usize::from(third)] & 0x01 == 0x01)
                            .map(|at| at as u64)
                            .collect();
                        assert_eq!(
                            all(&probe, &memory, from),
                            plain,
                            "{len} {second} {third} {mask:#x} {from}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn both_routines_find_the_same() {
        let mut memory = vec![0u8; 300];
        // The first has two of the bytes alone.
        for (place, byte) in
            [(10, 1), (13, 2), (130, 1), (133, 2), (137, 3), (150, 1), (153, 2), (157, 3)]
        {
            memory[place] = byte;
        }
        let [first, second, third] = [1, 2, 3].map(|value| MaskedByte { value, mask: 0xff });
        let probe = Probe::new(first, (second, 3), (third, 7)).unwrap();
        let found = guarded::find_both(&probe.vectors, probe.distances, &memory[..256 + 7]);
        assert!(found.iter().all(|found| *found == (128, 1 << 2 | 1 << 22)), "{found:?}");
        assert!(Probe::new(first, (second, 7), (third, 3)).is_none());
    }
}
