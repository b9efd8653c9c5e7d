// SPDX-License-Identifier: Apache-2.0 OR MIT
//! x86-64 page tables of a target: from a guest-virtual address (GVA) to a guest-physical one
//! (GPA).
//!
//! The tables are the target's and may say anything: a walk reads one entry for each level, at most
//! five in all, so that tables that point at each other do no harm. While a
//! target runs, they may also change between two reads.
//!
//! ```
//! use kvmmem_memory::paging::{AddressSpace, Levels};
//!
//! # let memory = vec![0u8; 0x5000];
//! // Reads the target's memory, for example by `View::read_at` or `Session::read_physical`.
//! let read = |gpa: u64, buf: &mut [u8]| -> std::io::Result<()> {
//!     let start = usize::try_from(gpa).unwrap_or(usize::MAX);
//!     let place = memory.get(start..).and_then(|rest| rest.get(..buf.len()));
//!     buf.copy_from_slice(place.ok_or(std::io::ErrorKind::UnexpectedEof)?);
//!     Ok(())
//! };
//! let space = AddressSpace { cr3: 0x1000, levels: Levels::Four };
//! let walk = space.walk(0xffff_ffff_8100_0000, read);
//! assert!(walk.end.is_err(), "an empty table maps nothing");
//! ```

mod absent;
mod depth;
mod entry;
mod space;
mod vcpu;

use std::error::Error;

pub use absent::Absent;
pub use entry::Entry;
use entry::{ADDRESS, NO_EXECUTE, PRESENT, USER, WRITABLE};
pub use space::{AddressSpace, Levels};
pub use vcpu::{ControlRegisters, PagingError};

/// Bytes of the smallest page.
const SMALL: usize = 4096;

/// What all the levels together allow. What the vCPU's CR0, CR4 and protection keys forbid is not
/// known here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Permissions {
    /// Stores are allowed.
    pub is_writable: bool,
    /// User mode may use the page.
    pub is_user: bool,
    /// Instructions may be fetched.
    pub is_executable: bool,
}

/// Where a GVA leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Translation {
    /// The address itself, not that of its page.
    pub gpa: u64,
    /// Bytes of the page: 4 KiB, 2 MiB or 1 GiB.
    pub page_size: u64,
    /// What may be done there.
    pub permissions: Permissions,
}

/// A walk: the entries that were read, outermost first, and how it ended.
#[derive(Debug)]
pub struct Walk<E: Error + 'static> {
    /// At most one for each level.
    pub entries: Vec<Entry>,
    /// The translation, or why there is none.
    pub end: Result<Translation, WalkError<E>>,
}

/// Why a GVA has no translation, or cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum WalkError<E: Error + 'static> {
    /// The address cannot exist with that many levels.
    #[error("gva {gva:#x} is not canonical with {} levels of page tables", levels.count())]
    NotCanonical {
        /// The address.
        gva: u64,
        /// How many levels.
        levels: Levels,
    },
    /// An entry is not present; [`Entry::absent`] says what it may mean.
    #[error("gva {gva:#x} is not mapped: the {entry} is not present{}", entry.absent(*gva).unwrap_or(Absent::Unknown))]
    NotPresent {
        /// The address.
        gva: u64,
        /// The entry that ends the walk.
        entry: Entry,
    },
    /// An entry has reserved bits set, with which the vCPU would fault: this is no page table, or
    /// CR3 is wrong.
    #[error(
        "gva {gva:#x} is not mapped: the {entry} has reserved bits {reserved:#x} set; is that CR3 right?"
    )]
    Reserved {
        /// The address.
        gva: u64,
        /// The entry.
        entry: Entry,
        /// Which of its bits.
        reserved: u64,
    },
    /// An entry cannot be read.
    #[error("cannot read the level {level} page table entry of gva {gva:#x}, at gpa {gpa:#x}")]
    Table {
        /// The address.
        gva: u64,
        /// The entry's level.
        level: u8,
        /// Where the entry lies.
        gpa: u64,
        /// What went wrong.
        #[source]
        source: E,
    },
    /// The page itself cannot be read.
    #[error("cannot read gva {gva:#x}, which is gpa {gpa:#x}")]
    Page {
        /// First address of the part that cannot be read.
        gva: u64,
        /// Where it leads.
        gpa: u64,
        /// What went wrong.
        #[source]
        source: E,
    },
    /// The range to be read passes the end of the address space.
    #[error("{len:#x} bytes from gva {gva:#x} on pass the end of the address space")]
    End {
        /// First address.
        gva: u64,
        /// Length in bytes.
        len: usize,
    },
}

impl AddressSpace {
    /// Looks up `gva`. `read` fills a buffer from the target's memory at a GPA; it is asked for 8
    /// bytes at a time, aligned to 8, once for each level.
    pub fn walk<E: Error>(
        &self,
        gva: u64,
        read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Walk<E> {
        let mut entries = Vec::with_capacity(self.levels.count().into());
        let end = self.descend(gva, read, &mut entries);
        Walk { entries, end }
    }

    /// Copies `buf.len()` bytes from `gva` on, page by page.
    ///
    /// # Errors
    /// [`WalkError`]. What lies before [`WalkError::gva`] was read, and is in `buf`; what the rest
    /// of it holds is not specified.
    pub fn read<E: Error>(
        &self,
        gva: u64,
        buf: &mut [u8],
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), WalkError<E>> {
        let len = buf.len();
        let mut at = gva;
        let mut rest = buf;
        while !rest.is_empty() {
            let Translation { gpa, page_size, .. } = self.walk(at, &mut read).end?;
            let in_page = page_size - gpa % page_size;
            let part = rest.len().min(usize::try_from(in_page).unwrap_or(usize::MAX));
            let (now, later) = rest.split_at_mut(part);
            read_page(at, gpa, now, &mut read)?;
            rest = later;
            if !rest.is_empty() {
                at = at.checked_add(part as u64).ok_or(WalkError::End { gva, len })?;
            }
        }
        Ok(())
    }

    fn descend<E: Error>(
        &self,
        gva: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
        entries: &mut Vec<Entry>,
    ) -> Result<Translation, WalkError<E>> {
        if !self.levels.is_canonical(gva) {
            return Err(WalkError::NotCanonical { gva, levels: self.levels });
        }
        let mut table = self.cr3 & ADDRESS;
        let mut permissions = Permissions { is_writable: true, is_user: true, is_executable: true };
        let mut level = self.levels.count();
        loop {
            let mut entry = Entry { level, gpa: 0, value: 0 };
            let span = entry.span();
            entry.gpa = table + gva / span % 512 * 8;
            let mut bytes = [0; 8];
            read(entry.gpa, &mut bytes).map_err(|source| WalkError::Table {
                gva,
                level,
                gpa: entry.gpa,
                source,
            })?;
            entry.value = u64::from_le_bytes(bytes);
            let value = entry.value;
            entries.push(entry);
            if value & PRESENT == 0 {
                return Err(WalkError::NotPresent { gva, entry });
            }
            let reserved = value & entry.reserved_bits();
            if reserved != 0 {
                return Err(WalkError::Reserved { gva, entry, reserved });
            }
            permissions.is_writable &= value & WRITABLE != 0;
            permissions.is_user &= value & USER != 0;
            permissions.is_executable &= value & NO_EXECUTE == 0;
            if entry.is_leaf() {
                let gpa = (value & ADDRESS & !(span - 1)) | (gva & (span - 1));
                return Ok(Translation { gpa, page_size: span, permissions });
            }
            table = value & ADDRESS;
            level -= 1;
        }
    }
}

/// Reads a page or a part of one. A large page may lie in memory in part only.
fn read_page<E: Error>(
    mut gva: u64,
    mut gpa: u64,
    buf: &mut [u8],
    read: &mut impl FnMut(u64, &mut [u8]) -> Result<(), E>,
) -> Result<(), WalkError<E>> {
    if read(gpa, buf).is_ok() {
        return Ok(());
    }
    let mut rest = buf;
    while !rest.is_empty() {
        let in_page = SMALL - usize::try_from(gpa).unwrap_or(0) % SMALL;
        let (now, later) = rest.split_at_mut(in_page.min(rest.len()));
        read(gpa, now).map_err(|source| WalkError::Page { gva, gpa, source })?;
        (gva, gpa) = (gva.wrapping_add(now.len() as u64), gpa.wrapping_add(now.len() as u64));
        rest = later;
    }
    Ok(())
}

impl<E: Error> WalkError<E> {
    /// The first address that cannot be read or translated.
    pub fn gva(&self) -> u64 {
        match self {
            Self::NotCanonical { gva, .. }
            | Self::NotPresent { gva, .. }
            | Self::Reserved { gva, .. }
            | Self::Table { gva, .. }
            | Self::Page { gva, .. } => *gva,
            // All up to the last address of the address space.
            Self::End { .. } => 0,
        }
    }
}
