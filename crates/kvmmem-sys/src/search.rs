// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where memory may hold a pattern: two of its bytes are compared at many places at a time. The search of a target's memory
//! looks at that memory in place ([`Foreign::find`](crate::foreign::Foreign::find)), and copies only where this finds a candidate.

use crate::guarded::{self, BLOCK, Vectors};

/// Places that are looked at together.
pub const PLACES: usize = BLOCK;

/// Two bytes of a pattern and how far they are apart.
#[derive(Clone, Debug)]
pub struct Pair {
    vectors: Vectors,
    distance: u8,
}

/// A byte of which only the bits of a mask count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Masked {
    /// The bits that count, as they are to be.
    pub value: u8,
    /// Which bits count.
    pub mask: u8,
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
        (0..u64::BITS).filter(move |bit| self.places >> bit & 1 != 0).map(move |bit| self.at + u64::from(bit))
    }
}

impl Pair {
    /// `second` follows `first` at `distance`, which may be 0 where there is one byte alone.
    pub fn new(first: Masked, second: Masked, distance: u8) -> Self {
        let vectors = Vectors {
            first: [first.value & first.mask; 32],
            first_mask: [first.mask; 32],
            second: [second.value & second.mask; 32],
            second_mask: [second.mask; 32],
        };
        Self { vectors, distance }
    }

    /// How far the second byte is behind the first one.
    pub fn distance(&self) -> usize {
        self.distance.into()
    }

    pub(crate) fn vectors(&self) -> &Vectors {
        &self.vectors
    }

    /// The first block of candidates in `memory`, from place `from` on.
    pub fn find(&self, memory: &[u8], from: usize) -> Option<Candidates> {
        let end = memory.len().saturating_sub(self.distance());
        let places = end.checked_sub(from)?;
        let blocks = places - places % BLOCK;
        let rest = memory.get(from..)?;
        // SAFETY: `rest` has `places` and the distance, so that many bytes may be loaded. They are this program's own and do not
        // vanish, so that it does not matter whether the thread is prepared for SIGBUS.
        let (left, found) = unsafe { guarded::find(&self.vectors, rest.as_ptr(), blocks, self.distance()) };
        if found != 0 {
            return Some(Candidates { at: (from + blocks - left) as u64, places: found });
        }
        let found = self.find_some(memory.get(from + blocks..)?, places - blocks);
        (found != 0).then_some(Candidates { at: (from + blocks) as u64, places: found })
    }

    /// Which of the first `places`, at most [`PLACES`], match.
    pub(crate) fn find_some(&self, memory: &[u8], places: usize) -> u64 {
        let Vectors { first, first_mask, second, second_mask } = &self.vectors;
        let is = |value: &[u8; 32], mask: &[u8; 32], byte: &u8| byte & mask[0] == value[0];
        let bytes = memory.iter().zip(memory.iter().skip(self.distance())).take(places);
        let found = |(one, other): (&u8, &u8)| is(first, first_mask, one) && is(second, second_mask, other);
        bytes.map(found).enumerate().fold(0, |all, (bit, found)| all | u64::from(found) << bit)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// All candidates, block by block.
    fn all(pair: &Pair, memory: &[u8], mut from: usize) -> Vec<u64> {
        let mut all = Vec::new();
        while let Some(found) = pair.find(memory, from) {
            all.extend(found.iter());
            from = usize::try_from(found.at).unwrap() + PLACES;
        }
        all
    }

    #[test]
    fn candidates_are_those_of_a_plain_search() {
        // Few values, so that there are many candidates; a small generator, so that it is the same each time.
        let mut state = 1u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            u8::try_from(state >> 24).unwrap()
        };
        for len in [0usize, 1, 63, 64, 65, 128, 200, 1000] {
            let memory: Vec<u8> = (0..len).map(|_| next() & 0x8f).collect();
            for distance in [0u8, 1, 5, 63, 64, 255] {
                for mask in [0xff, 0x0f, 0xf0] {
                    let (one, other) = (Masked { value: 0x83, mask }, Masked { value: 0x07, mask: 0x07 });
                    let pair = Pair::new(one, other, distance);
                    for from in [0, 1, 64, 70] {
                        let plain: Vec<u64> = (from..len.saturating_sub(distance.into()))
                            .filter(|at| memory[*at] & mask == 0x83 & mask)
                            .filter(|at| memory[at + usize::from(distance)] & 0x07 == 0x07)
                            .map(|at| at as u64)
                            .collect();
                        assert_eq!(all(&pair, &memory, from), plain, "{len} {distance} {mask:#x} {from}");
                    }
                }
            }
        }
    }

    #[test]
    fn both_routines_find_the_same() {
        let mut memory = vec![0u8; 300];
        memory[130] = 1;
        memory[133] = 2;
        let pair = Pair::new(Masked { value: 1, mask: 0xff }, Masked { value: 2, mask: 0xff }, 3);
        let found = guarded::find_both(pair.vectors(), &memory[..256 + 3], 3);
        assert!(found.iter().all(|found| *found == (128, 1 << 2)), "{found:?}");
    }
}
