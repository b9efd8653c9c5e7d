// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Errors of the tables.

/// Why there are no symbols.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// There is no table at the note's address, and none with the form of one.
    #[error(
        "the kernel's symbol table is not in memory: it was built without CONFIG_KALLSYMS, or its memory is not all there"
    )]
    NotFound,
    /// The number of symbols makes no sense.
    #[error("the kernel's symbol table has {count} entries, which makes no sense")]
    Count {
        /// That number.
        count: u32,
    },
    /// The table ends early.
    #[error("the kernel's symbol table has only {found} of {count} names")]
    Short {
        /// How many there should be.
        count: u32,
        /// How many there are.
        found: usize,
    },
    /// A part of the table cannot be read.
    #[error("the kernel's symbol table cannot be read at gva {gva:#x}")]
    Read {
        /// First address of what was to be read.
        gva: u64,
    },
    /// No scheme gives the addresses in the note.
    #[error("the kernel's symbol table does not fit the addresses in its VMCOREINFO note")]
    Addresses,
}
