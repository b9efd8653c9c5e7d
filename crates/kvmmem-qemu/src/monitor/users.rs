// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Users of a monitor, and those that its connection is lent to.

use std::io;
use std::sync::{Arc, Weak};
use std::time::Duration;

use super::subscriber::Subscriber;
use crate::qmp::Qmp;

/// Connects again to the same QEMU, or finds that it cannot be reached now. May take seconds.
pub type Find = dyn Fn() -> Option<Qmp> + Send + Sync;

/// Does a job that may wait for seconds, on another thread than the one that steps.
///
/// # Errors
/// Where there is no thread for it.
pub type Run = dyn Fn(Box<dyn FnOnce() + Send>) -> io::Result<()> + Send + Sync;

/// A user of a monitor.
pub(super) struct User {
    pub(super) subscriber: Weak<dyn Subscriber>,
    pub(super) find: Arc<Find>,
    /// The longest pause between two attempts to connect.
    pub(super) again_at_last: Duration,
    pub(super) run: Arc<Run>,
}

/// Users of a monitor, and how many loans there are of its connection.
#[derive(Default)]
pub(super) struct Users {
    list: Vec<User>,
    loans: usize,
    /// The last user has gone, and no other one is expected.
    is_left: bool,
}

impl Users {
    pub(super) fn add(&mut self, user: User) {
        self.list.push(user);
        self.is_left = false;
    }

    pub(super) fn remove(&mut self, subscriber: &Weak<dyn Subscriber>) {
        self.list.retain(|user| {
            user.subscriber.strong_count() > 0 && !Weak::ptr_eq(&user.subscriber, subscriber)
        });
        self.is_left = self.list.is_empty();
    }

    /// Records that a user is about to subscribe.
    pub(super) fn expect(&mut self) {
        self.is_left = false;
    }

    pub(super) fn lend(&mut self) {
        self.loans += 1;
    }

    pub(super) fn end_loan(&mut self) {
        self.loans -= 1;
    }

    /// Whether no user is left, which would step the monitor.
    pub(super) fn are_gone(&self) -> bool {
        self.is_left
    }

    /// Whether the connection is used neither by a user nor by a loan.
    pub(super) fn need_nothing(&self) -> bool {
        self.is_left && self.loans == 0
    }

    /// What does jobs, where there is a user.
    pub(super) fn run(&self) -> Option<Arc<Run>> {
        self.list.first().map(|user| Arc::clone(&user.run))
    }

    pub(super) fn all(&self) -> &[User] {
        &self.list
    }
}
