// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A virtual address space of the target: its root table and how deep its tables are.

/// How many levels of tables the target uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Levels {
    /// 48-bit addresses.
    Four,
    /// 57-bit addresses: CR4.LA57 is set.
    Five,
}

impl Levels {
    /// The number.
    pub fn count(self) -> u8 {
        match self {
            Self::Four => 4,
            Self::Five => 5,
        }
    }

    /// Bits of an address that have a meaning.
    pub fn address_bits(self) -> u32 {
        12 + 9 * u32::from(self.count())
    }

    /// Whether the bits of `gva` above its meaning repeat the highest one that has one.
    pub fn is_canonical(self, gva: u64) -> bool {
        let shift = 64 - self.address_bits();
        (gva << shift).cast_signed() >> shift == gva.cast_signed()
    }
}

/// A virtual address space of the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressSpace {
    /// The register as the vCPU holds it; only the address in it counts.
    pub cr3: u64,
    /// How deep the tables are.
    pub levels: Levels,
}
