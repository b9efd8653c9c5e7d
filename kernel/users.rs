// SPDX-License-Identifier: GPL-2.0-only
//! Users of a PCI slot: the views that show it, and how far each has followed the host.
//!
//! [`crate::slot`] has them. A generation is acknowledged to the host once all have followed it.

use kernel::prelude::*;

struct User {
    number: u64,
    /// Nothing of a generation before this one is used any more.
    followed: u64,
}

/// The views that show one slot.
pub(crate) struct Users {
    list: KVec<User>,
    last: u64,
}

impl Users {
    pub(crate) const fn new() -> Self {
        Self {
            list: KVec::new(),
            last: 0,
        }
    }

    /// Adds a user that uses nothing of a generation before this one; returns its number.
    pub(crate) fn add(&mut self, followed: u64) -> Result<u64> {
        let number = self.last.wrapping_add(1);
        self.list.push(User { number, followed }, GFP_KERNEL)?;
        self.last = number;
        Ok(number)
    }

    pub(crate) fn follow(&mut self, number: u64, generation: u64) {
        if let Some(user) = self.list.iter_mut().find(|user| user.number == number) {
            user.followed = generation;
        }
    }

    /// Whether it was there.
    pub(crate) fn remove(&mut self, number: u64) -> bool {
        let count = self.list.len();
        self.list.retain(|user| user.number != number);
        self.list.len() < count
    }

    /// The generation that all have followed; `None` where there are no users.
    pub(crate) fn followed(&self) -> Option<u64> {
        self.list.iter().map(|user| user.followed).min()
    }
}
