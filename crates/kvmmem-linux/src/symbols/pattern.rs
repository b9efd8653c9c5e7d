// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Kernels before 6.0, whose note does not say where the tables are.

use super::{Symbols, TableError};
use crate::space::Space;
use crate::vmcoreinfo::Note;

/// Not written yet: such kernels have no symbols.
pub(super) fn read(_space: &Space<'_>, _note: &Note) -> Result<Symbols, TableError> {
    Err(TableError::NotFound)
}
