// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Accesses to whole words of a mapping.

use kvmmem_sys::foreign::Word;

use super::Mapping;
use super::error::MappingError;

impl Mapping {
    /// Reads the byte at `offset`.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// println!("{:#x}", mapping.read_u8(0x13)?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn read_u8(&self, offset: u64) -> Result<u8, MappingError> {
        self.word(offset)
    }

    /// Reads the word at `offset`, a multiple of 2, in one access.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// println!("{:#x}", mapping.read_u16(0x12)?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn read_u16(&self, offset: u64) -> Result<u16, MappingError> {
        self.word(offset)
    }

    /// Reads the word at `offset`, a multiple of 4, in one access.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// println!("{:#x}", mapping.read_u32(0x14)?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn read_u32(&self, offset: u64) -> Result<u32, MappingError> {
        self.word(offset)
    }

    /// Reads the word at `offset`, a multiple of 8, in one access.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// println!("{:#x}", mapping.read_u64(0x18)?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn read_u64(&self, offset: u64) -> Result<u64, MappingError> {
        self.word(offset)
    }

    /// Writes the byte at `offset`.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// mapping.write_u8(0x13, 0xcc)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn write_u8(&self, offset: u64, value: u8) -> Result<(), MappingError> {
        self.set_word(offset, value)
    }

    /// Writes the word at `offset`, a multiple of 2, in one access.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// mapping.write_u16(0x12, 0xcccc)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn write_u16(&self, offset: u64, value: u16) -> Result<(), MappingError> {
        self.set_word(offset, value)
    }

    /// Writes the word at `offset`, a multiple of 4, in one access.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// mapping.write_u32(0x14, 1)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn write_u32(&self, offset: u64, value: u32) -> Result<(), MappingError> {
        self.set_word(offset, value)
    }

    /// Writes the word at `offset`, a multiple of 8, in one access.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// mapping.write_u64(0x18, 1)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn write_u64(&self, offset: u64, value: u64) -> Result<(), MappingError> {
        self.set_word(offset, value)
    }

    fn word<W: Word>(&self, offset: u64) -> Result<W, MappingError> {
        self.access(offset, W::SIZE as u64, |memory| memory.read_word(offset))
    }

    fn set_word<W: Word + Copy>(&self, offset: u64, value: W) -> Result<(), MappingError> {
        self.access(offset, W::SIZE as u64, |memory| memory.write_word(offset, value))
    }
}
