// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How deep page tables are, from the tables alone, for tools that have no registers (CR4.LA57).
//!
//! Tables of five levels can be walked as if they had four: the walk ends one level early, in a
//! table, and nothing faults. Tables of four levels, walked as if they had five, break rules: a 2
//! MiB page is taken for one of 1 GiB, whose address has reserved bits, and the data behind a PTE
//! is taken for a page table. So the walks go five levels deep and look for broken rules. The
//! tables are the target's: a wrong answer shows it other memory of its own.

use std::error::Error;

use super::entry::{ADDRESS, Entry, PRESENT};
use super::space::Levels;

const PAGE: usize = 4096;

/// The most tables that are read.
const MAX_TABLES: usize = 64;

/// The most branches of one table that are followed, from both ends of the table by turns.
const MAX_BRANCHES: usize = 6;

/// The most entries of a possible page table whose pages are looked for.
const MAX_PROBES: usize = 8;

/// Frames below this may be a machine's memory or devices even where nothing can be read there;
/// words of data that happen to have the lowest bit set are mostly not below it.
const NEAR: u64 = 1 << 40;

impl Levels {
    /// Finds out how many levels the tables at `cr3` have. `None` if the tables do not show it, for
    /// example because they map nothing. `read` fills a buffer, at most a page, from the
    /// target's memory at a GPA.
    pub fn detect<E: Error>(
        cr3: u64,
        read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Option<Self> {
        let mut survey = Survey { read, tables: 0, for_four: 0, for_five: 0, is_four: false };
        survey.descend(&mut vec![cr3 & ADDRESS]);
        match (survey.is_four, survey.for_four, survey.for_five) {
            (true, ..) => Some(Self::Four),
            (_, four, five) if five > four => Some(Self::Five),
            (_, four, five) if four > five => Some(Self::Four),
            _ => None,
        }
    }
}

/// What was seen so far.
struct Survey<R> {
    read: R,
    /// How many tables were read.
    tables: usize,
    /// Places that look like four levels.
    for_four: usize,
    /// Places that look like five.
    for_five: usize,
    /// Five levels are impossible: an entry has reserved bits set.
    is_four: bool,
}

impl<E: Error, R: FnMut(u64, &mut [u8]) -> Result<(), E>> Survey<R> {
    /// Looks at the table at the end of `path`, as a table of five levels.
    fn descend(&mut self, path: &mut Vec<u64>) {
        let Some(table) = path.last().copied().and_then(|gpa| self.table(gpa)) else { return };
        // 5 for the outermost.
        let level = u8::try_from(6 - path.len()).unwrap_or(0);
        let present = table.iter().filter(|value| *value & PRESENT != 0);
        let entries: Vec<Entry> = present.map(|&value| Entry { level, gpa: 0, value }).collect();
        self.is_four |=
            level > 1 && entries.iter().any(|entry| entry.reserved_bits() & entry.value != 0);
        if level == 2 && entries.iter().any(Entry::is_leaf) {
            self.for_five += 1;
        }
        if level == 1 {
            self.judge(&table, &entries);
            return;
        }
        for entry in from_both_ends(&entries).filter(|entry| !entry.is_leaf()).take(MAX_BRANCHES) {
            let next = entry.value & ADDRESS;
            // Kernels have entries that lead back to a table, and data behind these are tables in
            // any case.
            if self.is_four || self.tables >= MAX_TABLES || next == 0 || path.contains(&next) {
                continue;
            }
            path.push(next);
            self.descend(path);
            path.pop();
        }
    }

    /// Whether the page is a page table, as it must be if there are five levels, or data.
    fn judge(&mut self, words: &[u64], present: &[Entry]) {
        if words.iter().all(|word| *word == 0) {
            return;
        }
        let frames =
            from_both_ends(present).map(|entry| entry.value & ADDRESS).filter(|frame| *frame != 0);
        let (mut probes, mut hits, mut is_near) = (0, 0, true);
        for frame in frames.take(MAX_PROBES) {
            probes += 1;
            hits += usize::from((self.read)(frame, &mut [0; 8]).is_ok());
            is_near &= frame < NEAR;
        }
        if hits > 0 && hits * 4 >= probes * 3 {
            self.for_five += 1;
        } else if hits > 0 || probes == 0 || !is_near {
            self.for_four += 1;
        }
        // Else all entries may be of a page table whose pages are a device's, or are not granted:
        // that tells nothing.
    }

    fn table(&mut self, gpa: u64) -> Option<Vec<u64>> {
        self.tables += 1;
        let mut bytes = [0; PAGE];
        (self.read)(gpa, &mut bytes).ok()?;
        let (words, _) = bytes.as_chunks::<8>();
        Some(words.iter().map(|word| u64::from_le_bytes(*word)).collect())
    }
}

/// The last entry, the first, the last but one and so on: kernels have the last ones, processes the
/// first.
fn from_both_ends(entries: &[Entry]) -> impl Iterator<Item = &Entry> {
    let mut rest = entries.iter();
    let mut from_end = false;
    std::iter::from_fn(move || {
        from_end = !from_end;
        if from_end { rest.next_back() } else { rest.next() }
    })
}
