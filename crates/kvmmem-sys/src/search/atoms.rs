// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Multi-pattern filter: whether memory may hold one of many short patterns. A search with rules
//! asks this first ([`Foreign::may_hold`](crate::foreign::Foreign::may_hold)), and copies memory
//! for its engine only if it may.
//!
//! The method is that of Hyperscan's "Teddy": patterns are put into eight groups. For each of
//! four bytes, a table maps each half of the byte to the groups that may have it. A place with a
//! group left is compared with the patterns themselves.

use super::byte::MaskedByte;
use crate::guarded::{self, BLOCK, Groups};

/// The most patterns: with more, nearly every place would be compared with them.
const MAX: usize = 64;

/// Groups: one for each bit of a byte.
const GROUPS: usize = 8;

const LEN: usize = Atoms::LEN;

/// Patterns of two to four bytes.
#[derive(Clone, Debug)]
pub struct Atoms {
    groups: Groups,
    wanted: Vec<Atom>,
}

/// A pattern. What lies behind its end matches anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Atom {
    len: usize,
    bytes: [MaskedByte; LEN],
}

impl Atoms {
    /// Bytes of a pattern that are looked at.
    pub const LEN: usize = 4;

    /// `None` where there are too many patterns, or one is too short; of one of more than four
    /// bytes, the first four are looked for.
    pub fn new(patterns: impl IntoIterator<Item = Vec<MaskedByte>>) -> Option<Self> {
        let mut wanted: Vec<Atom> = Vec::new();
        for pattern in patterns {
            let mut bytes = [MaskedByte { value: 0, mask: 0 }; LEN];
            for (byte, MaskedByte { value, mask }) in bytes.iter_mut().zip(&pattern) {
                *byte = MaskedByte { value: value & mask, mask: *mask };
            }
            let atom = Atom { len: pattern.len().min(LEN), bytes };
            if atom.len < 2 || atom.bytes.iter().take(2).any(|byte| byte.mask == 0) {
                return None;
            }
            if !wanted.contains(&atom) {
                wanted.push(atom);
            }
            if wanted.len() > MAX {
                return None;
            }
        }
        Some(Self { groups: groups(&wanted), wanted })
    }

    /// Whether there is none at all.
    pub(crate) fn is_empty(&self) -> bool {
        self.wanted.is_empty()
    }

    /// Whether one of the patterns is at the beginning of `memory`.
    pub(crate) fn is_at(&self, memory: &[u8]) -> bool {
        let is_it = |atom: &Atom| {
            atom.len <= memory.len()
                && atom
                    .bytes
                    .iter()
                    .zip(memory)
                    .all(|(wanted, byte)| byte & wanted.mask == wanted.value)
        };
        self.wanted.iter().any(is_it)
    }

    /// Whether one of the patterns is in `memory`, or `few` blocks have candidates that are none
    /// and so is one more: it is cheaper not to know then.
    pub(crate) fn may_be_in(&self, memory: &[u8], few: &mut u64) -> bool {
        let mut rest = memory;
        while !rest.is_empty() && !self.is_empty() {
            let places = rest.len().saturating_sub(LEN - 1);
            let blocks = places - places % BLOCK;
            // SAFETY: the places and the three bytes behind the last one lie in `rest`. They are
            // this program's own and do not vanish, so that it does not matter whether the thread
            // is prepared for signals.
            let Some((left, found)) = (unsafe { self.find_blocks(rest.as_ptr(), blocks) }) else {
                return true;
            };
            // The block with candidates, or what is left at the end.
            rest = rest.get(blocks - left..).unwrap_or_default();
            let is_candidate = |place: &usize| found == 0 || found >> place & 1 != 0;
            let mut places = (0..rest.len().min(BLOCK)).filter(is_candidate);
            if places.any(|place| self.is_at(rest.get(place..).unwrap_or_default())) {
                return true;
            }
            if left > 0 {
                if *few == 0 {
                    return true;
                }
                *few -= 1;
            }
            rest = rest.get(BLOCK..).unwrap_or_default();
        }
        false
    }

    /// [`guarded::find_any`].
    ///
    /// # Safety
    /// As there.
    pub(crate) unsafe fn find_blocks(
        &self,
        from: *const u8,
        places: usize,
    ) -> Option<(usize, u64)> {
        // SAFETY: the caller's.
        unsafe { guarded::find_any(&self.groups, from, places) }
    }
}

/// Puts patterns into groups so that few other bytes are in one: each where it adds least.
fn groups(wanted: &[Atom]) -> Groups {
    /// The halves that some pattern of a group has: a bit each, for each byte, low and high.
    type Halves = [[u16; 2]; LEN];
    let halves = |atom: &Atom| -> Halves {
        atom.bytes.map(|MaskedByte { value, mask }| {
            [0, 4].map(|shift| {
                let is_it = |half: &u8| half & (mask >> shift) & 0xf == (value >> shift) & 0xf;
                (0..16).filter(is_it).fold(0, |all, half| all | 1 << half)
            })
        })
    };
    let join = |one: &Halves, other: &Halves| -> Halves {
        std::array::from_fn(|at| std::array::from_fn(|half| one[at][half] | other[at][half]))
    };
    // How many of all four-byte words are in it.
    let size = |group: &Halves| -> u64 {
        group.iter().flatten().map(|halves| u64::from(halves.count_ones())).product()
    };
    let mut all = [[[0; 2]; LEN]; GROUPS];
    for atom in wanted {
        let own = halves(atom);
        let grown = |group: &&mut Halves| size(&join(group, &own)) - size(group);
        if let Some(group) = all.iter_mut().min_by_key(grown) {
            *group = join(group, &own);
        }
    }
    let mut groups = Groups::new();
    for (number, group) in all.iter().enumerate() {
        for (at, halves) in group.iter().enumerate() {
            for (half, set) in halves.iter().enumerate() {
                for (value, groups) in groups.halves[at][half].iter_mut().enumerate() {
                    *groups |= u8::from(set >> (value % 16) & 1 != 0) << number;
                }
            }
        }
    }
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folded(text: &[u8]) -> Vec<MaskedByte> {
        let mask = |byte: u8| if byte.is_ascii_alphabetic() { !0x20 } else { 0xff };
        text.iter().map(|byte| MaskedByte { value: *byte, mask: mask(*byte) }).collect()
    }

    /// The places of 64 at which the routine sees a candidate.
    fn candidates(atoms: &Atoms, memory: &[u8; 67]) -> u64 {
        // SAFETY: that many bytes are there, and do not vanish.
        unsafe { atoms.find_blocks(memory.as_ptr(), 64) }.unwrap().1
    }

    #[test]
    fn candidates_are_all_places_of_atoms_and_few_others() {
        if !is_x86_feature_detected!("avx2") {
            return;
        }
        let texts: [&[u8]; 12] = [
            b"pass",
            b"p\0a\0",
            b"secr",
            b"kvmm",
            b"exam",
            b"\x24\x18\x48\x89",
            b"\xff\xfe",
            b"MZ\x90",
            b"\x80\x81\x82\x83",
            b"key=",
            b"-----BEGIN",
            b"\0\x01\x02",
        ];
        let atoms = Atoms::new(texts.map(folded)).unwrap();
        let mut state = 1u32;
        let mut others = 0;
        for round in 0..2000usize {
            let mut memory: [u8; 67] = std::array::from_fn(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                // Text, or anything.
                if round % 2 == 0 {
                    b'a' + state.to_le_bytes()[3] % 26
                } else {
                    state.to_le_bytes()[3]
                }
            });
            let text = texts[round % texts.len()];
            let place = round % 64;
            let len = text.len().min(67 - place);
            memory[place..place + len].copy_from_slice(&text[..len]);
            if len > 1 && round % 3 == 0 {
                memory[place + 1] = memory[place + 1].to_ascii_uppercase();
            }
            let is_at: u64 =
                (0..64).filter(|at| atoms.is_at(&memory[*at..])).map(|at| 1 << at).sum();
            let found = candidates(&atoms, &memory);
            assert_eq!(found & is_at, is_at, "{memory:?}");
            assert!(is_at >> place & 1 != 0 || len < text.len().min(LEN), "{text:?} at {place}");
            others += (found & !is_at).count_ones();
        }
        assert!(others < 2000 * 64 / 100, "{others}");
    }

    #[test]
    fn patterns_that_cannot_be_looked_for_are_refused() {
        assert!(Atoms::new([folded(b"a")]).is_none());
        assert!(Atoms::new([folded(b"")]).is_none());
        assert!(Atoms::new([vec![MaskedByte { value: 0, mask: 0 }; 4]]).is_none());
        let many = |count: u8| Atoms::new((0..count).map(|number| folded(&[number, 200, 201])));
        assert!(many(64).is_some() && many(65).is_none());
        // The same one again is no other.
        assert!(Atoms::new((0..100).map(|_| folded(b"same"))).is_some());
        assert!(Atoms::new([]).unwrap().is_empty());
    }
}
