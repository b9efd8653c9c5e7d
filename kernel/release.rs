// SPDX-License-Identifier: GPL-2.0-only
//! Waits for the last user of a shared object.

use kernel::prelude::*;
use kernel::sync::{Arc, Completion};

/// Field of the shared object that is dropped last.
pub(crate) struct Release(Arc<Completion>);

/// Waits until its [`Release`] is dropped.
pub(crate) struct ReleaseWaiter(Arc<Completion>);

impl Release {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(Arc::pin_init(Completion::new(), GFP_KERNEL_ACCOUNT)?))
    }

    pub(crate) fn waiter(&self) -> ReleaseWaiter {
        ReleaseWaiter(self.0.clone())
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        self.0.complete_all();
    }
}

impl ReleaseWaiter {
    /// Sleeps until the shared object is dropped. The caller must not hold a reference.
    pub(crate) fn wait(self) {
        self.0.wait_for_completion();
    }
}
