// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mappings: a range of a view's memory in this process.
//!
//! Tools get one from [`crate::View::map`]. The memory belongs to another virtual machine, so it is
//! only ever copied; there is no reference into it.

mod error;
mod words;

use std::sync::Arc;

use kvmmem_sys::foreign::{Foreign, ForeignError};
use kvmmem_sys::search::{Atoms, Candidates, Probe};

use super::backend::Backend;
pub use error::MappingError;

/// A range of a view, mapped into this process until it is dropped. Its address is congruent to the
/// guest-physical one modulo 2 MiB (1 GiB if the range is that long).
///
/// The contents may change at any moment, so they are copied: there is no slice of them. An access
/// to removed memory is an error, not a SIGBUS that kills the process: see [`crate::view`] on
/// signals. In a virtual machine without the module each of the methods proves its access, which
/// takes a system call for each MiB and each window of the view: read much at once there.
#[derive(Clone, Debug)]
pub struct Mapping {
    gpa: u64,
    memory: Arc<Foreign>,
    /// The most bytes that one proof covers, if each access is proven.
    proof_limit: Option<usize>,
    /// Dropped after the memory.
    backend: Arc<dyn Backend>,
}

impl Mapping {
    pub(super) fn new(gpa: u64, memory: Arc<Foreign>, backend: Arc<dyn Backend>) -> Self {
        Self { gpa, memory, proof_limit: backend.proof_limit(), backend }
    }

    /// First guest-physical address.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// println!("{:#x} to {:#x}", mapping.gpa(), mapping.gpa() + mapping.len());
    /// # Ok(())
    /// # }
    /// ```
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Length in bytes.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// let last_byte = mapping.read_u8(mapping.len() - 1)?;
    /// # Ok(())
    /// # }
    /// ```
    #[allow(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> u64 {
        self.memory.len()
    }

    /// Address in this process, for information.
    ///
    /// In a virtual machine without the module, an access at this address that is not made by the
    /// methods here is proven by nothing: after the device is unplugged it reads zeros without a
    /// signal. What it read counts only if one of the methods here succeeds at the same place
    /// afterwards.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// println!("see {:#x} in /proc/self/maps", mapping.address());
    /// # Ok(())
    /// # }
    /// ```
    pub fn address(&self) -> usize {
        self.memory.address()
    }

    /// Whether it may be written.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// if mapping.is_writable() {
    ///     mapping.write_u8(0, 0xcc)?;
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn is_writable(&self) -> bool {
        self.memory.is_writable()
    }

    /// Copies the bytes at `offset` into `buf`. If the target writes meanwhile, the copy may mix
    /// old and new bytes.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// let mut bytes = [0; 4096];
    /// mapping.read(0x1000, &mut bytes)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MappingError`]; the bytes before a lost one are copied.
    pub fn read(&self, offset: u64, buf: &mut [u8]) -> Result<(), MappingError> {
        let Some(limit) = self.proof_limit else {
            return self.memory.read(offset, buf).map_err(|error| self.error(error));
        };
        self.check(offset, buf.len())?;
        let mut at = offset;
        for part in buf.chunks_mut(limit) {
            self.access(at, part.len() as u64, |memory| memory.read(at, part))?;
            at += part.len() as u64;
        }
        Ok(())
    }

    /// Searches for bytes of a pattern in place: the first block of
    /// [`PLACES`](crate::search::PLACES), among `places` from `offset`, in which `probe` is found.
    /// The target may change the bytes at any moment, so copy them to decide whether the pattern
    /// is there. The bytes that the probe [reaches](Probe::reach) after the last place must lie in
    /// the mapping too.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// use kvmmem::search::{MaskedByte, Probe};
    ///
    /// let [f, r, e] = [b'f', b'r', b'e'].map(|value| MaskedByte { value, mask: 0xff });
    /// if let Some(probe) = Probe::new(f, (r, 1), (e, 2))
    ///     && let Some(found) = mapping.find(&probe, 0, mapping.len() - probe.reach() as u64)?
    /// {
    ///     println!("\"fre\" may be at offsets {:?}", found.iter().collect::<Vec<_>>());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn find(
        &self,
        probe: &Probe,
        offset: u64,
        places: u64,
    ) -> Result<Option<Candidates>, MappingError> {
        let reach = probe.reach() as u64;
        self.in_parts(offset, places, reach, |memory, at, places| memory.find(probe, at, places))
    }

    /// Whether the `len` bytes at `offset` may hold one of `atoms`: `false` if none was found,
    /// `true` if one was or if looking would cost more than it saves.
    ///
    /// ```no_run
    /// # use kvmmem::search::Atoms;
    /// # fn example(mapping: &kvmmem::Mapping, atoms: &Atoms) -> Result<(), kvmmem::MappingError> {
    /// if mapping.may_hold(atoms, 0, mapping.len())? {
    ///     println!("search it");
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn may_hold(&self, atoms: &Atoms, offset: u64, len: u64) -> Result<bool, MappingError> {
        let places = len.saturating_sub(Atoms::LEN as u64 - 1);
        let behind = len - places;
        let found = self.in_parts(offset, places, behind, |memory, at, places| {
            Ok(memory.may_hold(atoms, at, places + behind)?.then_some(()))
        })?;
        Ok(found.is_some())
    }

    /// Loads and discards `len` bytes at `offset`, a multiple of 128: the floor that benchmarks
    /// compare searches with. `None` on a processor without AVX2.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// let is_measured = mapping.sweep(0, 1 << 20)?.is_some();
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MappingError`].
    pub fn sweep(&self, offset: u64, len: usize) -> Result<Option<()>, MappingError> {
        self.access(offset, len as u64, |memory| memory.sweep(offset, len))
    }

    /// Maps the pages of `len` bytes at `offset`, both multiples of the page size, at once, so that
    /// later accesses fault less. Pages that the target never used are allocated, as by reading.
    /// This is a hint: failures are ignored.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// mapping.populate(0, mapping.len());
    /// # Ok(())
    /// # }
    /// ```
    pub fn populate(&self, offset: u64, len: u64) {
        let _ = self.memory.populate(offset, len);
    }

    /// Removes the pages of `len` bytes at `offset`, both multiples of the page size, from this
    /// process's page tables. The target's memory is unchanged, and the next access maps it again.
    /// For memory that is read once: threads remove pages as they go, instead of one thread at the
    /// end. This is a hint: failures are ignored.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// // Read for the last time.
    /// mapping.release(0, mapping.len());
    /// # Ok(())
    /// # }
    /// ```
    pub fn release(&self, offset: u64, len: u64) {
        let _ = self.memory.release(offset, len);
    }

    /// Copies `bytes` to `offset`; the target sees them at once.
    ///
    /// ```no_run
    /// # fn example(mapping: &kvmmem::Mapping) -> Result<(), kvmmem::MappingError> {
    /// mapping.write(0x10, b"patched")?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`MappingError`]; the bytes before a lost one have been copied.
    pub fn write(&self, offset: u64, bytes: &[u8]) -> Result<(), MappingError> {
        self.access(offset, bytes.len() as u64, |memory| memory.write(offset, bytes))
    }

    /// Makes an access to `len` bytes at `offset`, and proves it where nothing else keeps it from
    /// reaching what is not the view's.
    fn access<T>(
        &self,
        offset: u64,
        len: u64,
        mut access: impl FnMut(&Foreign) -> Result<T, ForeignError>,
    ) -> Result<T, MappingError> {
        if self.proof_limit.is_none() {
            return access(&self.memory).map_err(|error| self.error(error));
        }
        let (gpa, mut outcome) = (self.gpa.saturating_add(offset), None);
        let is_proven = self.backend.prove(gpa, len, &mut || outcome = Some(access(&self.memory)));
        let proven = outcome.filter(|_| is_proven).ok_or(MappingError::Lost { gpa })?;
        proven.map_err(|error| self.error(error))
    }

    /// What `find` finds first at `places` from `offset` on, each of which has `behind` bytes more
    /// behind it. Proven in parts, for none of which the view's end waits long.
    fn in_parts<T>(
        &self,
        offset: u64,
        places: u64,
        behind: u64,
        mut find: impl FnMut(&Foreign, u64, u64) -> Result<Option<T>, ForeignError>,
    ) -> Result<Option<T>, MappingError> {
        let part = self.proof_limit.map_or(u64::MAX, |limit| limit as u64);
        let (mut at, mut left) = (offset, places);
        loop {
            let count = left.min(part);
            let len = count.saturating_add(behind);
            let found = self.access(at, len, |memory| find(memory, at, count))?;
            left -= count;
            if found.is_some() || left == 0 {
                return Ok(found);
            }
            at += count;
        }
    }

    fn check(&self, offset: u64, len: usize) -> Result<(), MappingError> {
        let size = self.len();
        let end = offset.checked_add(len as u64).filter(|end| *end <= size);
        end.map(drop).ok_or(MappingError::Outside { offset, len, size })
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
