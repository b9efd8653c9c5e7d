// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How much one listing of all processes may take. Processes may share what they have, so that a
//! few megabytes of the guest's could name any amount of it.

use std::cell::Cell;

use crate::kernel::KernelError;

/// Bytes that a listing takes, or steps that it makes, unless its caller sets another limit.
pub(crate) const LISTING: usize = 1 << 30;

/// What is left of a limit.
#[derive(Debug)]
pub(crate) struct Budget {
    left: Cell<usize>,
    /// The limit, for errors.
    what: &'static str,
}

impl Budget {
    pub(crate) fn new(limit: usize, what: &'static str) -> Self {
        Self { left: Cell::new(limit), what }
    }

    /// # Errors
    /// [`KernelError::TooMuch`]: less is left.
    pub(crate) fn take(&self, count: usize) -> Result<(), KernelError> {
        let left = self.left.get().checked_sub(count);
        self.left.set(left.ok_or(KernelError::TooMuch { what: self.what })?);
        Ok(())
    }

    pub(crate) fn left(&self) -> usize {
        self.left.get()
    }

    /// Gives back what was taken since so much was left, as it is not kept.
    pub(crate) fn restore(&self, left: usize) {
        self.left.set(left);
    }
}
