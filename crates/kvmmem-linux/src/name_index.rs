// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Index of names, by which symbols and types are looked up.
//!
//! The names are the guest's. Their hash has a seed that the guest does not know, so that it cannot
//! choose names that collide; and of names that are the same, a look-up takes [`MAX_SAME`] at most.

use std::hash::{BuildHasher, RandomState};

/// The most symbols or types of one name that a look-up finds. Debian's kernels have some hundred.
pub(crate) const MAX_SAME: usize = 4096;

/// Bits of an entry that are a hash; the others are a number.
const HASH: u64 = !0 << 32;

/// Numbers by the hash of their names.
#[derive(Debug, Default)]
pub(crate) struct NameIndex {
    seed: RandomState,
    /// The hash of a name and its number each; ascending, once they are sorted.
    entries: Vec<u64>,
}

impl NameIndex {
    /// Adds a name; [`NameIndex::sort`] comes after the last one.
    pub(crate) fn add(&mut self, name: &[u8], number: u32) {
        self.entries.push(self.hash(name) | u64::from(number));
    }

    pub(crate) fn sort(&mut self) {
        self.entries.sort_unstable();
    }

    /// The numbers of the names with the same hash, ascending.
    pub(crate) fn candidates(&self, name: &[u8]) -> impl Iterator<Item = u32> + use<'_> {
        let hash = self.hash(name);
        let first = self.entries.partition_point(|entry| *entry < hash);
        let same = self.entries.iter().skip(first).take_while(move |entry| *entry & HASH == hash);
        same.filter_map(|entry| u32::try_from(entry & !HASH).ok())
    }

    /// The hash of a name, in the upper half.
    fn hash(&self, name: &[u8]) -> u64 {
        self.seed.hash_one(name) & HASH
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    fn fnv(state: u32, text: &[u8]) -> u32 {
        text.iter().fold(state, |hash, byte| (hash ^ u32::from(*byte)).wrapping_mul(0x0100_0193))
    }

    /// Two texts that lead from a state of FNV-1a to the same other one, which is returned as well.
    fn pair(state: u32) -> ([String; 2], u32) {
        let mut seen = HashMap::new();
        (0_u32..)
            .find_map(|number| {
                let text = format!("{number:06x}");
                let next = fnv(state, text.as_bytes());
                Some(([seen.insert(next, text.clone())?, text], next))
            })
            .unwrap()
    }

    /// 8,192 names that one hash without a seed has the same value for.
    fn colliding() -> Vec<String> {
        let (mut names, mut state) = (vec![String::new()], 0x811c_9dc5);
        for _ in 0..13 {
            let (texts, next) = pair(state);
            names = names
                .iter()
                .flat_map(|name| texts.each_ref().map(|text| format!("{name}{text}")))
                .collect();
            state = next;
        }
        assert!(names.iter().all(|name| fnv(0x811c_9dc5, name.as_bytes()) == state));
        names
    }

    #[test]
    fn a_guest_cannot_choose_names_that_collide() {
        let names = colliding();
        let mut index = NameIndex::default();
        (0..).zip(&names).for_each(|(number, name)| index.add(name.as_bytes(), number));
        index.sort();
        for (number, name) in (0..).zip(&names) {
            let compared: Vec<u32> = index.candidates(name.as_bytes()).collect();
            assert!(compared.contains(&number) && compared.len() < 8, "{name}: {compared:?}");
        }
    }
}
