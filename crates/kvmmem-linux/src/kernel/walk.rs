// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A walk over structures of the kernel as an iterator.

use super::error::KernelError;

/// Where a walk gets its items from.
pub trait Step {
    /// What it finds.
    type Item;

    /// The next item; `None` at the end.
    ///
    /// # Errors
    /// [`KernelError`]: one or several items cannot be read. The next call reads those after them.
    fn step(&mut self) -> Result<Option<Self::Item>, KernelError>;
}

/// The items of a walk. An error stands for what cannot be read, and the walk continues after it
/// where it can: a walk without an error is complete.
#[derive(Debug)]
pub struct Walk<S>(Option<S>);

impl<S> Walk<S> {
    /// The items that `steps` finds.
    pub fn of(steps: S) -> Self {
        Self(Some(steps))
    }
}

impl<S: Step> Iterator for Walk<S> {
    type Item = Result<S::Item, KernelError>;

    fn next(&mut self) -> Option<Self::Item> {
        let item = self.0.as_mut()?.step().transpose();
        if item.as_ref().is_none_or(|item| item.as_ref().is_err_and(|error| !error.is_local())) {
            self.0 = None;
        }
        item
    }
}
