// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's symbols, from the tables that it keeps of them (kallsyms, `kernel/kallsyms.c`).
//!
//! Names stay compressed, as they lie in the guest; one pass over them makes an index by hash. A
//! kernel of 200,000 symbols takes 8 MB and some 20 ms. All tables are the guest's: each is
//! limited, and what is read from it must fit the addresses that the VMCOREINFO note has for the
//! same names, or what is found in the image.

mod addresses;
mod error;
mod index;
mod names;
mod pattern;
mod tables;

use crate::space::Space;
use crate::vmcoreinfo::{KERNEL_MAP, Note};
pub use error::TableError;
pub use index::{Symbol, Symbols};
pub(crate) use tables::Addresses;

impl Symbols {
    /// Reads the tables of the kernel whose note and whose address space these are.
    ///
    /// # Errors
    /// [`TableError`].
    pub fn read(space: &Space<'_>, note: &Note) -> Result<Self, TableError> {
        let fits = |addresses: &Addresses<'_>| tables::fit_note(note, addresses);
        match tables::of_note(space, note) {
            Some(tables) => tables.read(space, &fits),
            None => pattern::read(space, note.symbol("_stext").ok_or(TableError::NotFound)?, &fits),
        }
    }

    /// Finds the tables of a kernel without a note by their form, in the image that is mapped in
    /// this space. `fits` checks their content.
    ///
    /// # Errors
    /// [`TableError`].
    pub(crate) fn search(
        space: &Space<'_>,
        fits: &dyn Fn(&Addresses<'_>) -> bool,
    ) -> Result<Self, TableError> {
        pattern::read(space, KERNEL_MAP, fits)
    }
}
