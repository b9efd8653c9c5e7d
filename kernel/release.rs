// SPDX-License-Identifier: GPL-2.0-only
//! Waiting for the last user of something that is shared.

use kernel::prelude::*;
use kernel::sync::{Arc, Completion};

/// Lies in what is shared, as the field that is dropped last.
pub(crate) struct Release(Arc<Completion>);

/// Waits for the [`Release`] that it was made with.
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
    /// Sleeps until nobody uses it any more. The caller must not use it itself.
    pub(crate) fn wait(self) {
        self.0.wait_for_completion();
    }
}
