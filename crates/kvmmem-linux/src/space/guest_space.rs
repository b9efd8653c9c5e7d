// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest-virtual address space: looks addresses up, and reads.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use kvmmem_memory::paging::{
    Absent, AddressSpace, Levels, Permissions, Translation, Walk, WalkError,
};
use kvmmem_memory::{Memory, MemoryError, PAGE_SIZE, VectoredError};

/// Why an address of the guest could not be read.
pub type SpaceError = WalkError<MemoryError>;

/// The most page tables that are kept, 4 KiB each.
const MAX_TABLES: usize = 256;

/// Bytes of an entry of a page table.
pub(super) const ENTRY: usize = 8;

/// Where the last entry of a table is, which is that of the highest addresses.
const LAST_ENTRY: u64 = 511 * ENTRY as u64;

/// Of an entry: instructions may not be fetched.
const NO_EXECUTE: u64 = 1 << 63;

/// Neighbours in both spaces.
#[derive(Clone, Copy, Default)]
struct Run {
    gva: u64,
    gpa: u64,
    len: usize,
}

/// A virtual address space of the guest. Many threads may use one.
pub struct Space<'m> {
    pub(super) memory: &'m dyn Memory,
    pub(super) root: AddressSpace,
    pub(super) encryption: u64,
    tables: Mutex<HashMap<u64, Box<[u8; PAGE_SIZE]>>>,
}

impl<'m> Space<'m> {
    /// The space whose outermost table is `root`. `encryption` has the bits of an entry that mark a
    /// page as encrypted (AMD SME's C bit); they are not part of its address.
    pub fn new(memory: &'m dyn Memory, root: AddressSpace, encryption: u64) -> Self {
        Self { memory, root, encryption, tables: Mutex::default() }
    }

    /// Another space of the same guest.
    pub fn with_root(&self, cr3: u64) -> Self {
        Self::new(self.memory, AddressSpace { cr3, levels: self.root.levels }, self.encryption)
    }

    /// The outermost table, as CR3 has it, and how deep the tables are.
    pub fn root(&self) -> AddressSpace {
        self.root
    }

    /// How deep the tables are.
    pub fn levels(&self) -> Levels {
        self.root.levels
    }

    /// The guest-physical memory in which the space lies.
    pub fn memory(&self) -> &'m dyn Memory {
        self.memory
    }

    /// Drops all tables that were read: the next look-up reads them again.
    pub fn forget(&self) {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Where `gva` leads. Pages that are in memory and may not be accessed (PROT_NONE, NUMA
    /// balancing) lead somewhere as well, with no permissions.
    ///
    /// # Errors
    /// [`SpaceError`].
    pub fn translate(&self, gva: u64) -> Result<Translation, SpaceError> {
        match self.resolve(gva, |gpa, entry| self.read_kept(gpa, entry)) {
            Ok(translation) => Ok(translation),
            Err(error @ WalkError::NotCanonical { .. }) => Err(error),
            // The guest may have mapped it since its tables were read.
            Err(_) => {
                let translation =
                    self.resolve(gva, |gpa, entry| self.memory.read_at(gpa, entry))?;
                self.forget();
                Ok(translation)
            }
        }
    }

    /// Where `gva` leads, with the entries of all tables on the way; tables that were read before
    /// are read again. A page that is in memory and may not be accessed is not present here.
    pub fn walk(&self, gva: u64) -> Walk<MemoryError> {
        self.walk_by(gva, |gpa, entry| self.memory.read_at(gpa, entry))
    }

    /// Whether the outermost table at `cr3` has the same entry for the kernel's image as this
    /// space. Every process's table has; of the two that page table isolation gives it, 4 KiB
    /// apart, the one that the kernel itself uses.
    pub(crate) fn shares_kernel(&self, cr3: u64) -> bool {
        let entry = |table: u64| {
            let mut entry = [0; ENTRY];
            self.memory.read_at(table + LAST_ENTRY, &mut entry).ok()?;
            // The vCPU sets accessed and dirty bits.
            Some(u64::from_le_bytes(entry) & !0xfff & !(1 << 63)).filter(|entry| *entry != 0)
        };
        let own = entry(table(self.root.cr3));
        let user = table(cr3);
        own.is_some()
            && [user, user & !(PAGE_SIZE as u64)].into_iter().any(|table| entry(table) == own)
    }

    /// Fills `buf` from `gva` on.
    ///
    /// # Errors
    /// [`SpaceError`], with the first address that cannot be read. Some of `buf` may have been
    /// filled then.
    pub fn read(&self, gva: u64, buf: &mut [u8]) -> Result<(), SpaceError> {
        let mut runs: Vec<Run> = Vec::new();
        let (mut done, mut end) = (0, Ok(()));
        while done < buf.len() {
            let found = match gva.checked_add(done as u64) {
                Some(at) => self.translate(at).map(|found| (at, found)),
                None => Err(WalkError::End { gva, len: buf.len() }),
            };
            let (at, Translation { gpa, page_size, .. }) = match found {
                Ok(found) => found,
                Err(error) => {
                    end = Err(error);
                    break;
                }
            };
            let in_page = usize::try_from(page_size - gpa % page_size).unwrap_or(usize::MAX);
            let len = in_page.min(buf.len() - done);
            match runs.last_mut() {
                Some(run) if run.gpa.checked_add(run.len as u64) == Some(gpa) => run.len += len,
                _ => runs.push(Run { gva: at, gpa, len }),
            }
            done += len;
        }
        self.fill(buf, &runs)?;
        end
    }

    fn fill(&self, buf: &mut [u8], runs: &[Run]) -> Result<(), SpaceError> {
        let (mut pieces, mut rest) = (Vec::with_capacity(runs.len()), buf);
        for Run { gpa, len, .. } in runs {
            let (piece, later) = rest.split_at_mut(rest.len().min(*len));
            pieces.push((*gpa, piece));
            rest = later;
        }
        let result = match &mut pieces[..] {
            [(gpa, bytes)] => self
                .memory
                .read_at(*gpa, bytes)
                .map_err(|source| VectoredError { piece: 0, source }),
            pieces => self.memory.read_vectored(pieces),
        };
        result.map_err(|VectoredError { piece, source }| {
            let Run { gva, gpa, .. } = runs.get(piece).copied().unwrap_or_default();
            WalkError::Page { gva, gpa, source }
        })
    }

    fn resolve(
        &self,
        gva: u64,
        read: impl Fn(u64, &mut [u8]) -> Result<(), MemoryError>,
    ) -> Result<Translation, SpaceError> {
        match self.walk_by(gva, read).end {
            Err(WalkError::NotPresent { gva, entry }) => match entry.absent(gva) {
                Some(Absent::ProtNone { gpa }) => Ok(Translation {
                    gpa,
                    page_size: 1 << (12 + 9 * u32::from(entry.level - 1)),
                    permissions: Permissions {
                        is_writable: false,
                        is_user: false,
                        is_executable: false,
                    },
                }),
                _ => Err(WalkError::NotPresent { gva, entry }),
            },
            end => end,
        }
    }

    fn walk_by(
        &self,
        gva: u64,
        read: impl Fn(u64, &mut [u8]) -> Result<(), MemoryError>,
    ) -> Walk<MemoryError> {
        self.root.walk(gva, |gpa, entry| {
            read(gpa, entry)?;
            // With page table isolation the table that the kernel uses forbids to execute all that
            // is the process's; the one that the process itself uses, and which is the
            // same otherwise, does not.
            let offset = gpa % PAGE_SIZE as u64;
            let is_process = gpa - offset == table(self.root.cr3) && offset < PAGE_SIZE as u64 / 2;
            // The frame of a page without access is inverted: there the bits of encryption count
            // where they are not set.
            let is_present = entry.first().is_some_and(|byte| byte & 1 != 0);
            let (clear, set) = if is_present { (self.encryption, 0) } else { (0, self.encryption) };
            let clear = clear | if is_process { NO_EXECUTE } else { 0 };
            for ((byte, clear), set) in
                entry.iter_mut().zip(clear.to_le_bytes()).zip(set.to_le_bytes())
            {
                *byte = *byte & !clear | set;
            }
            Ok(())
        })
    }

    /// Reads an entry from the tables that are kept.
    fn read_kept(&self, gpa: u64, entry: &mut [u8]) -> Result<(), MemoryError> {
        let offset = usize::try_from(gpa).unwrap_or(0) % PAGE_SIZE;
        let table = gpa - offset as u64;
        let mut tables = self.tables.lock().unwrap_or_else(PoisonError::into_inner);
        if !tables.contains_key(&table) {
            let mut bytes = Box::new([0; PAGE_SIZE]);
            self.memory.read_at(table, &mut bytes[..])?;
            if tables.len() >= MAX_TABLES {
                tables.clear();
            }
            tables.insert(table, bytes);
        }
        let words = tables.get(&table).and_then(|table| table.get(offset..offset + ENTRY));
        if let Some(word) = words
            && word.len() == entry.len()
        {
            entry.copy_from_slice(word);
        }
        Ok(())
    }
}

/// Address of the outermost table.
fn table(cr3: u64) -> u64 {
    cr3 & !(PAGE_SIZE as u64 - 1) & !(1 << 63)
}

impl std::fmt::Debug for Space<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Space").field("root", &self.root).finish_non_exhaustive()
    }
}
