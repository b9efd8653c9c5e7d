// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A view as memory that anything can be read from: what is written against [`Memory`] works on a
//! view.

use kvmmem_memory::{Memory, MemoryError, Range};

use super::{VectoredError, View, ViewError};

impl Memory for View {
    fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        Self::read_at(self, gpa, buf).map_err(|error| memory_error(gpa, error))
    }

    fn read_vectored(
        &self,
        pieces: &mut [(u64, &mut [u8])],
    ) -> Result<(), kvmmem_memory::VectoredError> {
        let result = Self::read_vectored(self, pieces);
        result.map_err(|VectoredError { piece, source }| {
            let gpa = pieces.get(piece).map_or(0, |(gpa, _)| *gpa);
            kvmmem_memory::VectoredError { piece, source: memory_error(gpa, source) }
        })
    }

    fn ranges(&self) -> Result<Vec<Range>, MemoryError> {
        Self::ranges(self).map_err(|error| memory_error(0, error))
    }

    fn data_from(&self, gpa: u64) -> Result<Option<Range>, MemoryError> {
        Self::data_from(self, gpa).map_err(|error| memory_error(gpa, error))
    }
}

fn memory_error(gpa: u64, error: ViewError) -> MemoryError {
    match error {
        ViewError::Hole { gpa, .. } => MemoryError::Hole { gpa },
        error if error.is_unreadable() => MemoryError::Unreadable { gpa, source: Box::new(error) },
        error => MemoryError::Ended(Box::new(error)),
    }
}
