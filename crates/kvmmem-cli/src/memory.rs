// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that a verb reads and writes by copy: a view's, a KVMI session's, or that in a dump file,
//! which is only read.

use kvmmem::host::CopyError;
use kvmmem::view::{View, ViewError};
use kvmmem::{PAGE_SIZE, Session, SessionError};
use kvmmem_memory::DumpFile;

/// The memory.
pub(crate) enum Memory {
    View(View),
    Session(Session),
    File(DumpFile),
}

/// Why memory cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemoryError {
    #[error(transparent)]
    View(#[from] ViewError),
    #[error(transparent)]
    Session(#[from] SessionError),
    #[error(transparent)]
    File(#[from] kvmmem_memory::MemoryError),
    #[error("a dump file is not written to")]
    IsFile,
}

impl MemoryError {
    /// Whether it is about the address alone, so that others may be read.
    pub(crate) fn is_of_address(&self) -> bool {
        match self {
            Self::View(ViewError::Hole { .. }) | Self::Session(SessionError::Refused { .. }) => {
                true
            }
            Self::View(ViewError::Copy { source, .. }) => {
                matches!(**source, CopyError::Hole | CopyError::NoMemory)
            }
            Self::File(error) => error.is_local(),
            _ => false,
        }
    }
}

impl Memory {
    /// Reads as much as can be, page by page; returns how many bytes that is, and why there are not
    /// more.
    pub(crate) fn read_prefix(&mut self, gpa: u64, buf: &mut [u8]) -> (usize, Option<MemoryError>) {
        match self.read(gpa, buf) {
            Err(error) if error.is_of_address() => {}
            result => return (if result.is_ok() { buf.len() } else { 0 }, result.err()),
        }
        let mut done = 0;
        while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
            let at = gpa + done as u64;
            let in_page = PAGE_SIZE - usize::try_from(at % PAGE_SIZE as u64).unwrap_or(0);
            let len = in_page.min(rest.len());
            if let Err(error) = rest.get_mut(..len).map_or(Ok(()), |part| self.read(at, part)) {
                return (done, Some(error));
            }
            done += len;
        }
        (done, None)
    }

    pub(crate) fn read(&mut self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        match self {
            Self::View(view) => view.read_at(gpa, buf)?,
            Self::Session(session) => session.read_physical(gpa, buf)?,
            Self::File(file) => kvmmem_memory::Memory::read_at(file, gpa, buf)?,
        }
        Ok(())
    }

    pub(crate) fn write(&mut self, gpa: u64, bytes: &[u8]) -> Result<(), MemoryError> {
        match self {
            Self::View(view) => view.write_at(gpa, bytes)?,
            Self::Session(session) => session.write_physical(gpa, bytes)?,
            Self::File(_) => return Err(MemoryError::IsFile),
        }
        Ok(())
    }
}
