// SPDX-License-Identifier: GPL-2.0-only
//! Waiting for the last user of something that is shared.

use kernel::prelude::*;
use kernel::sync::{Arc, Completion};

/// Lies in what is shared, as the field that is dropped last.
pub(crate) struct Release(Arc<Completion>);

/// Waits for the [`Release`] that it was made with.
pub(crate) struct Released(Arc<Completion>);

impl Release {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self(Arc::pin_init(Completion::new(), GFP_KERNEL_ACCOUNT)?))
    }

    pub(crate) fn waiter(&self) -> Released {
        Released(self.0.clone())
    }
}

impl Drop for Release {
    fn drop(&mut self) {
        self.0.complete_all();
    }
}

impl Released {
    /// Sleeps until nobody uses it any more. The caller must not use it itself.
    pub(crate) fn wait(self) {
        self.0.wait_for_completion();
    }
}
