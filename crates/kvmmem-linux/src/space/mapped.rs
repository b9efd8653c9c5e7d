// SPDX-License-Identifier: Apache-2.0 OR MIT
//! All that a process has in memory, by its page tables: for searches and dumps of it as a whole.

use kvmmem_memory::paging::{Absent, Entry};
use kvmmem_memory::{MemoryError, PAGE_SIZE, Range};

use super::guest_space::{ENTRY, Space};

/// The most page tables of one process: 128 GiB of small pages.
const MAX_TABLES: usize = 1 << 16;

/// The most parts of pages that lie in RAM. A page has one, unless RAM has a hole there: these are
/// as many as there are pages in so many tables, and what is in memory takes at most 800 MB.
const MAX_PARTS: usize = MAX_TABLES * PAGE_SIZE / ENTRY;

/// Bits 12 to 51 of an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

const PRESENT: u64 = 1;

/// Memory that lies together in both spaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// First guest-virtual address.
    pub gva: u64,
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
}

/// Why it is not known what a process has in memory.
#[derive(Debug, thiserror::Error)]
pub enum MappedError {
    /// A table cannot be read.
    #[error("cannot read the page table at gpa {gpa:#x}")]
    Table {
        /// Where it is.
        gpa: u64,
        /// Why.
        #[source]
        source: MemoryError,
    },
    /// There is more than a process of such a guest can have: the tables are damaged, or changed
    /// meanwhile.
    #[error("the page tables map more than a process of this guest can have")]
    TooMany,
}

impl Space<'_> {
    /// The lower half of the space, which is the process's own: what is in memory, ascending. Pages
    /// that may not be accessed are among it, and those of devices are not.
    ///
    /// # Errors
    /// [`MappedError`].
    pub fn mapped(&self) -> Result<Vec<Extent>, MappedError> {
        let table = |source| MappedError::Table { gpa: self.root.cr3 & ADDRESS, source };
        let ram = self.memory.ranges().map_err(table)?;
        self.mapped_to(&ram, MAX_PARTS).map(|(extents, _)| extents)
    }

    /// The same, where this is RAM; and how many of the parts are left.
    fn mapped_to(
        &self,
        ram: &[Range],
        parts_left: usize,
    ) -> Result<(Vec<Extent>, usize), MappedError> {
        // Pages may be mapped more than once, that of zeros for example.
        let total = ram.iter().fold(0u64, |sum, range| sum.saturating_add(range.len));
        let (extents, left) = (Vec::new(), total.saturating_mul(4));
        let mut walk = Walk { space: self, ram, extents, tables: 0, left, parts_left };
        walk.table(self.root.cr3 & ADDRESS, self.levels().count(), 0)?;
        Ok((walk.extents, walk.parts_left))
    }
}

struct Walk<'a, 'm> {
    space: &'a Space<'m>,
    /// RAM: disjoint, ascending.
    ram: &'a [Range],
    extents: Vec<Extent>,
    tables: usize,
    /// How many bytes may follow.
    left: u64,
    /// How many ranges of RAM may be looked at.
    parts_left: usize,
}

impl Walk<'_, '_> {
    /// Goes through a table, and at most four below it.
    fn table(&mut self, gpa: u64, level: u8, gva: u64) -> Result<(), MappedError> {
        self.tables += 1;
        if self.tables > MAX_TABLES {
            return Err(MappedError::TooMany);
        }
        let mut table = [0; PAGE_SIZE];
        self.space
            .memory
            .read_at(gpa, &mut table)
            .map_err(|source| MappedError::Table { gpa, source })?;
        let span = 1u64 << (12 + 9 * (u32::from(level) - 1));
        let is_root = level == self.space.levels().count();
        let entries = if is_root { 256 } else { 512 };
        for (number, bytes) in table.as_chunks::<ENTRY>().0.iter().take(entries).enumerate() {
            let value = u64::from_le_bytes(*bytes);
            if value == 0 {
                continue;
            }
            let number = number as u64;
            let entry = |value| Entry { level, gpa: gpa + number * ENTRY as u64, value };
            let gva = gva + number * span;
            if value & PRESENT == 0 {
                // Of an inverted frame the bits of encryption are not inverted.
                if let Some(Absent::ProtNone { gpa }) =
                    entry(value | self.space.encryption).absent(gva)
                {
                    self.page(gva, gpa, span)?;
                }
                continue;
            }
            let value = value & !self.space.encryption;
            if entry(value).is_leaf() {
                self.page(gva, value & ADDRESS & !(span - 1), span)?;
            } else if level > 1 {
                self.table(value & ADDRESS, level - 1, gva)?;
            }
        }
        Ok(())
    }

    fn page(&mut self, gva: u64, gpa: u64, len: u64) -> Result<(), MappedError> {
        let Some(end) = gpa.checked_add(len) else { return Ok(()) };
        let first = self.ram.partition_point(|range| range.end() <= gpa);
        let ram = self.ram.get(first..).unwrap_or_default();
        for range in ram.iter().take_while(|range| range.gpa < end) {
            self.parts_left = self.parts_left.checked_sub(1).ok_or(MappedError::TooMany)?;
            let start = gpa.max(range.gpa);
            let Some(len) = end.min(range.end()).checked_sub(start).filter(|len| *len > 0) else {
                continue;
            };
            let part = Extent { gva: gva + (start - gpa), gpa: start, len };
            self.left = self.left.checked_sub(part.len).ok_or(MappedError::TooMany)?;
            match self.extents.last_mut() {
                Some(last)
                    if last.gva + last.len == part.gva && last.gpa + last.len == part.gpa =>
                {
                    last.len += part.len;
                }
                _ => self.extents.push(part),
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use kvmmem_memory::Memory;
    use kvmmem_memory::paging::{AddressSpace, Levels};

    use super::*;

    /// RAM from 0 on.
    struct Ram(Vec<u8>);

    impl Memory for Ram {
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

    /// Memory of a MiB with these entries, each a table, an index and a value.
    fn mapped(levels: Levels, entries: &[(u64, u64, u64)]) -> Result<Vec<Extent>, MappedError> {
        let mut ram = Ram(vec![0; 1 << 20]);
        for (table, index, value) in entries {
            let at = usize::try_from(table + index * 8).unwrap();
            ram.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        Space::new(&ram, AddressSpace { cr3: 0x1000, levels }, 1 << 47).mapped()
    }

    #[test]
    fn pages_are_found_and_joined() {
        let tables = [(0x1000, 0, 0x2007), (0x2000, 0, 0x3007), (0x3000, 2, 0x4007)];
        let pages = [
            // Encrypted ones are the same.
            (0x4000, 0, 0x1_0007),
            (0x4000, 1, 0x1_1007 | 1 << 47),
            (0x4000, 2, 0x3_0007),
            // PROT_NONE, whose frame is inverted; not in memory; a device.
            (0x4000, 3, !0x3_1000 & ADDRESS | 1 << 47 | 1 << 8),
            (0x4000, 4, 0x1234 << 12),
            (0x4000, 5, 0xfee0_0007),
            // The kernel's half, and a large page that is RAM in part.
            (0x1000, 256, 0x2007),
            (0x3000, 4, 0x87),
        ];
        let expected = [
            Extent { gva: 0x40_0000, gpa: 0x1_0000, len: 0x2000 },
            Extent { gva: 0x40_2000, gpa: 0x3_0000, len: 0x2000 },
            Extent { gva: 0x80_0000, gpa: 0, len: 1 << 20 },
        ];
        assert_eq!(mapped(Levels::Four, &[&tables[..], &pages].concat()).unwrap(), expected);
        let five = [(0x1000, 0, 0x5007), (0x5000, 0, 0x2007), tables[1], tables[2]];
        assert_eq!(
            mapped(Levels::Five, &[&five[..], &pages[..6]].concat()).unwrap(),
            expected[..2]
        );
    }

    #[test]
    fn tables_that_lead_in_circles_end() {
        let own: Vec<_> = (0..512).map(|index| (0x1000, index, 0x1007)).collect();
        assert!(matches!(mapped(Levels::Four, &own), Err(MappedError::TooMany)));
        // Any number of large pages.
        let large: Vec<_> = (0..512).map(|index| (0x2000, index, 0x87)).collect();
        let root = [(0x1000, 0, 0x2007), (0x1000, 1, 0x2007)];
        assert!(matches!(
            mapped(Levels::Four, &[&large[..], &root].concat()),
            Err(MappedError::TooMany)
        ));
        let error = mapped(Levels::Four, &[(0x1000, 0, 0x7f00_0007)]).unwrap_err();
        assert!(matches!(error, MappedError::Table { gpa: 0x7f00_0000, .. }), "{error}");
    }

    /// RAM in many pieces, and a page table whose entries lead to these values.
    fn pieces(values: impl Iterator<Item = u64>) -> (Ram, Vec<Range>) {
        let mut ram = Ram(vec![0; 0x5000]);
        let tables = [(0x1000, 0x2007), (0x2000, 0x3007)].into_iter();
        for (at, value) in tables.chain((0x3000..).step_by(8).zip(values)) {
            ram.0[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        (ram, (0..1 << 16).map(|number| Range { gpa: number << 13, len: 0x1000 }).collect())
    }

    fn walk(ram: &Ram, ranges: &[Range], most: usize) -> Result<(usize, usize), MappedError> {
        let space = Space::new(ram, AddressSpace { cr3: 0x1000, levels: Levels::Four }, 0);
        let (extents, left) = space.mapped_to(ranges, most)?;
        Ok((extents.len(), most - left))
    }

    #[test]
    fn a_page_costs_the_ranges_of_ram_that_it_has() {
        // Of 2 MiB each, which have 256 ranges; all over RAM, and outside of it.
        let (ram, ranges) = pieces((0..512).map(|number| number << 22 | 0x87));
        assert_eq!(walk(&ram, &ranges, MAX_PARTS).unwrap(), (128 * 256, 128 * 256));
    }

    #[test]
    fn what_is_in_memory_has_a_limited_number_of_parts() {
        let (ram, mut ranges) = pieces((0..512).map(|_| 0x87));
        // As a dump of a file with a hole may say: the bytes alone are no limit.
        ranges.push(Range { gpa: 1 << 40, len: 1 << 45 });
        assert_eq!(walk(&ram, &ranges, 512 * 256).unwrap().1, 512 * 256);
        assert!(matches!(walk(&ram, &ranges, 512 * 256 - 1), Err(MappedError::TooMany)));
    }
}
