// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a [`View`](super::View) is made of: the driver's file, a connection to the broker, or PCI
//! devices that this process maps.

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Duration;

use kvmmem_abi::native::Stats;
use kvmmem_memory::Range;
use kvmmem_sys::foreign::Foreign;

use super::error::{ViewError, ViewOperation};
use super::status::{Event, Status};
use super::vectored::{VectoredError, fill};

/// An attached view. The [`View`](super::View) and its mappings share it, and it detaches when the
/// last of them is dropped.
pub(super) trait Backend: Debug + Send + Sync {
    fn status(&self) -> Result<Status, ViewError>;

    /// Identifies one run of the target; `None` if it is not known.
    fn instance(&self) -> Result<Option<u64>, ViewError>;

    fn is_writable(&self) -> bool;

    /// Copies the bytes at `gpa`, at least one and as many as come in one piece, into `buf`, which
    /// is not empty. Returns how many.
    fn read(&self, operation: ViewOperation, gpa: u64, buf: &mut [u8]) -> Result<usize, ViewError>;

    /// Copies at least one of `bytes`, which are not empty, to `gpa`. Returns how many.
    fn write(&self, operation: ViewOperation, gpa: u64, bytes: &[u8]) -> Result<usize, ViewError>;

    /// The next range at `gpa` or after it that holds data.
    fn data_from(&self, operation: ViewOperation, gpa: u64) -> Result<Option<Range>, ViewError>;

    /// Maps `range`, which is made of pages.
    fn map(&self, operation: ViewOperation, range: Range) -> Result<Arc<Foreign>, ViewError>;

    fn wait(&self, timeout: Duration) -> Result<Option<Event>, ViewError>;

    /// Closes the view, if it is open.
    fn detach(&self) -> Result<(), ViewError>;

    /// The target's name, if it is known.
    fn name(&self) -> Option<&str> {
        None
    }

    /// The driver's counters, if there is a driver.
    fn stats(&self) -> Result<Option<Stats>, ViewError> {
        Ok(None)
    }

    /// The parts of `range` that hold data; `None` if it cannot be told.
    fn data_in(
        &self,
        _operation: ViewOperation,
        _range: Range,
    ) -> Result<Option<Vec<Range>>, ViewError> {
        Ok(None)
    }

    fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), ViewError> {
        let operation = ViewOperation::Read { gpa, len: buf.len() };
        fill(gpa, buf, |gpa, rest| self.read(operation, gpa, rest))
    }

    fn read_vectored(&self, pieces: &mut [(u64, &mut [u8])]) -> Result<(), VectoredError> {
        for (piece, (gpa, bytes)) in pieces.iter_mut().enumerate() {
            self.read_at(*gpa, bytes).map_err(|source| VectoredError { piece, source })?;
        }
        Ok(())
    }

    fn write_at(&self, gpa: u64, bytes: &[u8]) -> Result<(), ViewError> {
        let operation = ViewOperation::Write { gpa, len: bytes.len() };
        if !self.is_writable() {
            return Err(ViewError::ReadOnly { operation });
        }
        let (mut gpa, mut rest) = (gpa, bytes);
        while !rest.is_empty() {
            let count = self.write(operation, gpa, rest)?;
            gpa = gpa.saturating_add(count as u64);
            rest = rest.get(count..).unwrap_or_default();
        }
        Ok(())
    }

    /// The most bytes that one [proof](Self::prove) covers; `None` if accesses to mapped memory
    /// need none, as it is removed before it can be another's.
    fn proof_limit(&self) -> Option<usize> {
        None
    }

    /// Makes an access to the `len` mapped bytes at `gpa`, more than once if need be. Returns
    /// whether the last one was to the view's memory, while it was open.
    fn prove(&self, _gpa: u64, _len: u64, access: &mut dyn FnMut()) -> bool {
        access();
        true
    }
}
