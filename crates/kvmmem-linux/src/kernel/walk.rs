// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A walk over structures of the kernel as an iterator.

use super::KernelError;

/// Where a walk gets its items from.
pub trait Step {
    /// What it finds.
    type Item;

    /// Goes on to the next item; `None` at the end.
    ///
    /// # Errors
    /// [`KernelError`]: the walk cannot go on.
    fn step(&mut self) -> Result<Option<Self::Item>, KernelError>;
}

/// The items of a walk. It ends after an error.
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
        if !matches!(item, Some(Ok(_))) {
            self.0 = None;
        }
        item
    }
}
