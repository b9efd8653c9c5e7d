// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The address space that a vCPU uses, from its control registers (Intel SDM volume 3, 5.1.1 "Four
//! Paging Modes").

use super::space::{AddressSpace, Levels};

/// CR0.PG.
const PAGING: u64 = 1 << 31;

/// CR4.PAE.
const PAE: u64 = 1 << 5;

/// CR4.LA57.
const FIVE_LEVELS: u64 = 1 << 12;

/// EFER.LMA.
const LONG_MODE: u64 = 1 << 10;

/// The registers of a vCPU that say how it translates addresses. The guest sets them to what it
/// likes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ControlRegisters {
    /// CR0.
    pub cr0: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER, where it is known: dump files do not have it.
    pub efer: Option<u64>,
}

/// Why a vCPU has no address space that can be walked.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PagingError {
    /// It has no page tables.
    #[error("its paging is off (CR0 {cr0:#x}), so it uses guest-physical addresses")]
    Off {
        /// CR0.
        cr0: u64,
    },
    /// Its page tables are those of 32-bit paging or of PAE paging.
    #[error(
        "it is not in long mode (CR4 {cr4:#x}), and page tables of 32-bit systems are not read"
    )]
    NotLong {
        /// CR4.
        cr4: u64,
    },
}

impl ControlRegisters {
    /// The address space that the vCPU uses. Where EFER is not known, a vCPU with PAE is taken to
    /// be in long mode.
    ///
    /// # Errors
    /// [`PagingError`].
    pub fn space(&self) -> Result<AddressSpace, PagingError> {
        let Self { cr0, cr3, cr4, efer } = *self;
        if cr0 & PAGING == 0 {
            return Err(PagingError::Off { cr0 });
        }
        if cr4 & PAE == 0 || efer.is_some_and(|efer| efer & LONG_MODE == 0) {
            return Err(PagingError::NotLong { cr4 });
        }
        let levels = if cr4 & FIVE_LEVELS == 0 { Levels::Four } else { Levels::Five };
        Ok(AddressSpace { cr3, levels })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_registers_say_how_addresses_are_translated() {
        let long =
            ControlRegisters { cr0: 0x8005_0033, cr3: 0x1000, cr4: 0x75_0eb0, efer: Some(0xd01) };
        let four = AddressSpace { cr3: 0x1000, levels: Levels::Four };
        assert_eq!(long.space(), Ok(four));
        assert_eq!(ControlRegisters { efer: None, ..long }.space(), Ok(four));
        let five = ControlRegisters { cr4: long.cr4 | 1 << 12, ..long };
        assert_eq!(five.space().unwrap().levels, Levels::Five);
        let off = ControlRegisters { cr0: 0x6000_0010, ..long };
        assert_eq!(off.space(), Err(PagingError::Off { cr0: 0x6000_0010 }));
        // PAE paging, and 32-bit paging.
        let pae = ControlRegisters { efer: Some(0x800), ..long };
        assert_eq!(pae.space(), Err(PagingError::NotLong { cr4: long.cr4 }));
        let legacy = ControlRegisters { cr4: 0x10, efer: None, ..long };
        assert_eq!(legacy.space(), Err(PagingError::NotLong { cr4: 0x10 }));
    }
}
