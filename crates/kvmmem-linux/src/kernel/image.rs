// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds kernels without their VMCOREINFO note, by the page tables that map their images
//! (`arch/x86/kernel/head_64.S`).
//!
//! An image lies in the last 2 GiB of each address space: the last entry of every process's
//! outermost table leads, with five levels over one table more, to the kernel's
//! `level3_kernel_pgt`, which has two entries, its last ones. That holds in the image's own symbols
//! and banner, which are checked once the tables have led to them. Memory that is encrypted (SEV)
//! cannot be read anyway, so that entries have no bits of encryption here.

use std::collections::BTreeMap;

use kvmmem_memory::paging::{AddressSpace, Levels};
use kvmmem_memory::{Memory, MemoryError, PAGE_SIZE};

use super::describe;
use super::guest_kernel::Kernel;
use crate::search::pages;
use crate::space::Space;
use crate::symbols::{Addresses, Symbols};

/// The most images whose symbols are read: one for each kernel since RAM was last cleared, and
/// those that a guest forges.
pub(super) const MAX_IMAGES: usize = 16;

/// Bytes of an entry, and where the last one of a table is.
const ENTRY: usize = 8;
const LAST: u64 = (PAGE_SIZE - ENTRY) as u64;

/// Of an entry: it is present and writable, it is a page and leads to no table.
const TABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

/// Bits 12 to 51 of an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// Bits of an entry that are 0 where it leads to a table of the kernel's.
const UNUSED: u64 = 0xfff0_0000_0000_0000 | LARGE;

/// What the kernel's banner begins with (`linux_banner`).
const BANNER: &[u8; 14] = b"Linux version ";

/// Names of the kernel's outermost table: that of `init_mm`, where it can have five levels and
/// where it cannot.
const TABLES: [&str; 2] = ["init_top_pgt", "swapper_pg_dir"];

/// Images that were found.
#[derive(Debug, Default)]
pub(super) struct Images {
    /// By the address of `level3_kernel_pgt`, a table that leads to it as one of four levels does.
    tables: BTreeMap<u64, u64>,
    /// Whether there are more than [`MAX_IMAGES`].
    pub(super) is_cut: bool,
}

impl Images {
    /// Searches the parts of memory that hold data.
    ///
    /// # Errors
    /// [`MemoryError::Ended`]. Memory that cannot be read is passed over.
    pub(super) fn find(memory: &dyn Memory) -> Result<Self, MemoryError> {
        let mut images = Self::default();
        let pick = |gpa: u64, entry: &[u8; ENTRY]| {
            let table = table(u64::from_le_bytes(*entry))?;
            is_image(memory, table).then_some((table, gpa))
        };
        pages(memory, LAST, pick, |found| {
            for (table, root) in found {
                let place = images.tables.entry(table).or_insert(root);
                *place = root.min(*place);
            }
            images.is_cut = images.tables.len() > MAX_IMAGES;
            !images.is_cut
        })?;
        Ok(images)
    }

    /// The kernels whose images these are.
    pub(super) fn kernels<'m>(&self, memory: &'m dyn Memory) -> Vec<Kernel<'m>> {
        self.tables.values().filter_map(|root| Kernel::of_image(memory, *root)).collect()
    }
}

impl<'m> Kernel<'m> {
    /// The kernel in the address space of a vCPU with this CR3: the kernel's own, or any process's.
    pub(super) fn of_cr3(memory: &'m dyn Memory, cr3: u64) -> Option<Self> {
        let cr3 = cr3 & ADDRESS;
        // With page table isolation, the second of two tables is the process's, and has little of
        // the kernel.
        let mut roots = vec![cr3 & !(PAGE_SIZE as u64), cr3];
        roots.dedup();
        let with_five: Vec<u64> =
            roots.iter().filter_map(|root| table(last(memory, *root)?)).collect();
        roots.into_iter().chain(with_five).find_map(|root| Self::of_image(memory, root))
    }

    /// The kernel whose image the last entry of `root` leads to, as in a table of four levels.
    fn of_image(memory: &'m dyn Memory, root: u64) -> Option<Self> {
        let image = table(last(memory, root)?).filter(|image| has_image(memory, *image))?;
        let space = Space::new(memory, AddressSpace { cr3: root, levels: Levels::Four }, 0);
        let symbols = Symbols::search(&space, &|addresses| {
            has_banner(&space, addresses) && own_table(&space, addresses, image).is_some()
        });
        let symbols = symbols.ok()?;
        let (gva, root) = own_table(&space, &|name| symbols.all(name).collect(), image)?;
        let space = Space::new(memory, root, 0);
        let note = describe::note(&space, &symbols, gva)?;
        Some(Self::with_symbols(note, space, symbols))
    }
}

fn has_banner(space: &Space<'_>, addresses: &Addresses<'_>) -> bool {
    let mut begin = [0; BANNER.len()];
    addresses("linux_banner")
        .iter()
        .any(|gva| space.read(*gva, &mut begin).is_ok() && begin == *BANNER)
}

/// Address of the kernel's outermost table by the symbols, if that table leads to the image.
fn own_table(
    space: &Space<'_>,
    addresses: &Addresses<'_>,
    image: u64,
) -> Option<(u64, AddressSpace)> {
    let gvas = TABLES.iter().flat_map(|name| addresses(name));
    gvas.filter(|gva| gva.is_multiple_of(PAGE_SIZE as u64)).find_map(|gva| {
        let cr3 = space.translate(gva).ok()?.gpa;
        let next = table(last(space.memory(), cr3)?)?;
        let levels = if next == image {
            Levels::Four
        } else if table(last(space.memory(), next)?)? == image {
            Levels::Five
        } else {
            return None;
        };
        Some((gva, AddressSpace { cr3, levels }))
    })
}

/// The table that an entry leads to.
fn table(entry: u64) -> Option<u64> {
    let is_table = entry & TABLE == TABLE && entry & UNUSED == 0;
    is_table.then_some(entry & ADDRESS).filter(|table| *table != 0)
}

fn last(memory: &dyn Memory, table: u64) -> Option<u64> {
    let mut entry = [0; ENTRY];
    memory.read_at(table.checked_add(LAST)?, &mut entry).ok()?;
    Some(u64::from_le_bytes(entry))
}

/// Whether a table has an entry for the first of the last two GiB.
fn has_image(memory: &dyn Memory, gpa: u64) -> bool {
    let mut entry = [0; ENTRY];
    memory.read_at(gpa + LAST - ENTRY as u64, &mut entry).is_ok()
        && table(u64::from_le_bytes(entry)).is_some()
}

/// Whether a table has entries for the last two GiB alone.
fn is_image(memory: &dyn Memory, gpa: u64) -> bool {
    // Few candidates reach the second read.
    if !has_image(memory, gpa) {
        return false;
    }
    let mut bytes = [0; PAGE_SIZE];
    memory.read_at(gpa, &mut bytes).is_ok()
        && bytes.iter().take(PAGE_SIZE - 2 * ENTRY).all(|byte| *byte == 0)
}
