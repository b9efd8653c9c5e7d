// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A part of a view that is mapped into this process.

use std::sync::Arc;

use kvmmem_sys::foreign::{Foreign, ForeignError};
use kvmmem_sys::search::{Atoms, Candidates, Probe};
use rustix::io::Errno;

use super::guest_endpoint::GuestConnection;
use super::host::HostView;

/// Why mapped memory was not accessed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MappingError {
    /// The access leaves the mapping.
    #[error("access at offset {offset:#x}, length {len:#x}, leaves the mapping of {size:#x} bytes")]
    Outside {
        /// Offset in bytes.
        offset: u64,
        /// Length in bytes.
        len: usize,
        /// The mapping's length in bytes.
        size: u64,
    },
    /// A word's offset is not a multiple of its size.
    #[error("offset {offset:#x} is not a multiple of {size}")]
    Unaligned {
        /// Offset in bytes.
        offset: u64,
        /// The word's size in bytes.
        size: usize,
    },
    /// The view may not write.
    #[error("the view is read-only; a grant with rw and Access::Granted allow it")]
    ReadOnly,
    /// The memory is not there any more: [`crate::View::status`] tells why.
    #[error(
        "gpa {gpa:#x} is not mapped any more: the view has ended or the target's memory map has changed"
    )]
    Lost {
        /// The first address that was not copied.
        gpa: u64,
    },
    /// SIGBUS, by which the system tells of lost memory, cannot be handled.
    #[error("cannot handle SIGBUS")]
    Guard(#[source] Errno),
}

/// A part of a view, mapped into this process until it is dropped, at an address that is congruent
/// to the guest-physical one modulo 2 MiB (1 GiB, if it is that long).
///
/// What it holds may change at any moment, so it is only ever copied: there is no slice of it.
/// Memory that goes away is an error, not a SIGBUS that kills the process: see [`crate::view`] on
/// signals.
#[derive(Clone, Debug)]
pub struct Mapping {
    gpa: u64,
    memory: Arc<Foreign>,
    /// Dropped after the memory.
    _keeps: Option<Keeps>,
}

/// What a mapping keeps open besides the device's file, which the system does.
#[derive(Clone, Debug)]
pub(super) enum Keeps {
    /// On the host, what ends the mapping together with the view.
    View(#[expect(dead_code, reason = "held")] Arc<HostView>),
    /// In a virtual machine, the connection that stands for the view's devices.
    Guest(#[expect(dead_code, reason = "held")] Arc<GuestConnection>),
}

impl Mapping {
    pub(super) fn new(gpa: u64, memory: Arc<Foreign>, keeps: Option<Keeps>) -> Self {
        Self { gpa, memory, _keeps: keeps }
    }

    /// First guest-physical address.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Length in bytes.
    #[allow(clippy::len_without_is_empty, reason = "it never is")]
    pub fn len(&self) -> u64 {
        self.memory.len()
    }

    /// Address in this process, for information.
    pub fn address(&self) -> usize {
        self.memory.address()
    }

    /// Whether it may be written.
    pub fn is_writable(&self) -> bool {
        self.memory.is_writable()
    }

    /// Copies `buf.len()` bytes from `offset` on. While the target writes, the copy may mix old and
    /// new bytes.
    ///
    /// # Errors
    /// [`MappingError`]; the bytes before a lost one have been copied.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), MappingError> {
        self.memory.read(offset, buf).map_err(|error| self.error(error))
    }

    /// Looks in place for bytes of a pattern: the first block of [`PLACES`](crate::search::PLACES)
    /// from `offset` on, among `places` of them, at which `probe` is found. Only a copy can
    /// tell whether the pattern is there, as the target may change it at any moment. What the
    /// probe [reaches](Probe::reach) behind the last place must lie in the mapping too.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn find(
        &self,
        probe: &Probe,
        offset: u64,
        places: u64,
    ) -> Result<Option<Candidates>, MappingError> {
        self.memory.find(probe, offset, places).map_err(|error| self.error(error))
    }

    /// Whether one of `atoms` may lie in the `len` bytes from `offset` on: `false` where none did,
    /// `true` where one does or where it is cheaper not to know.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn may_hold(&self, atoms: &Atoms, offset: u64, len: u64) -> Result<bool, MappingError> {
        self.memory.may_hold(atoms, offset, len).map_err(|error| self.error(error))
    }

    /// Loads every byte of `len` from `offset` on, a multiple of 128, and forgets it: what searches
    /// are measured against. `None` on a processor without AVX2.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn sweep(&self, offset: u64, len: usize) -> Result<Option<()>, MappingError> {
        self.memory.sweep(offset, len).map_err(|error| self.error(error))
    }

    /// Maps the pages of `len` bytes from `offset` on, both multiples of the page size, all at
    /// once, so that accesses that follow fault less. Pages that the target never used are
    /// allocated, as by reading. Nothing depends on its success.
    pub fn populate(&self, offset: u64, len: u64) {
        let _ = self.memory.populate(offset, len);
    }

    /// Takes the pages of `len` bytes from `offset` on out of this process's page tables, both
    /// multiples of the page size. The target's memory stays as it is, and the next access maps
    /// it again: for memory that is gone through once, so that it need not be done at the end
    /// by one thread alone. Nothing depends on its success.
    pub fn release(&self, offset: u64, len: u64) {
        let _ = self.memory.release(offset, len);
    }

    /// Copies `bytes` to `offset` on; the target sees them at once.
    ///
    /// # Errors
    /// [`MappingError`]; the bytes before a lost one have been copied.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MappingError> {
        self.memory.write(offset, bytes).map_err(|error| self.error(error))
    }

    /// Reads the byte at `offset`.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn read_u8(&self, offset: u64) -> Result<u8, MappingError> {
        self.memory.read_word(offset).map_err(|error| self.error(error))
    }

    /// Reads the word at `offset`, a multiple of 2, in one access.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn read_u16(&self, offset: u64) -> Result<u16, MappingError> {
        self.memory.read_word(offset).map_err(|error| self.error(error))
    }

    /// Reads the word at `offset`, a multiple of 4, in one access.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn read_u32(&self, offset: u64) -> Result<u32, MappingError> {
        self.memory.read_word(offset).map_err(|error| self.error(error))
    }

    /// Reads the word at `offset`, a multiple of 8, in one access.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn read_u64(&self, offset: u64) -> Result<u64, MappingError> {
        self.memory.read_word(offset).map_err(|error| self.error(error))
    }

    /// Writes the byte at `offset`.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn write_u8(&self, offset: u64, value: u8) -> Result<(), MappingError> {
        self.memory.write_word(offset, value).map_err(|error| self.error(error))
    }

    /// Writes the word at `offset`, a multiple of 2, in one access.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn write_u16(&self, offset: u64, value: u16) -> Result<(), MappingError> {
        self.memory.write_word(offset, value).map_err(|error| self.error(error))
    }

    /// Writes the word at `offset`, a multiple of 4, in one access.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn write_u32(&self, offset: u64, value: u32) -> Result<(), MappingError> {
        self.memory.write_word(offset, value).map_err(|error| self.error(error))
    }

    /// Writes the word at `offset`, a multiple of 8, in one access.
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn write_u64(&self, offset: u64, value: u64) -> Result<(), MappingError> {
        self.memory.write_word(offset, value).map_err(|error| self.error(error))
    }

    fn error(&self, error: ForeignError) -> MappingError {
        match error {
            ForeignError::Outside { offset, len, size } => {
                MappingError::Outside { offset, len, size }
            }
            ForeignError::Unaligned { offset, size } => MappingError::Unaligned { offset, size },
            ForeignError::ReadOnly => MappingError::ReadOnly,
            ForeignError::Lost { offset } => {
                MappingError::Lost { gpa: self.gpa.wrapping_add(offset) }
            }
            ForeignError::Guard(errno) => MappingError::Guard(errno),
        }
    }
}
