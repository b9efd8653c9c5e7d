// SPDX-License-Identifier: GPL-2.0-only
//! Looks for changes of a view that the host made, as it sends no interrupt.

use core::ops::Deref;

use kernel::sync::Arc;
use kernel::time::{Jiffies, msecs_to_jiffies};
use kernel::workqueue::{self, WorkItem, impl_has_delayed_work};

use crate::stats;
use crate::sys;
use crate::view::View;

/// The longest time in milliseconds from a change to the event: a delay of one tick of 4 ms may last for two.
pub(crate) const EVENT_MS: u32 = 10;

/// Between two looks.
pub(crate) fn delay() -> Jiffies {
    msecs_to_jiffies(4)
}

impl_has_delayed_work! {
    impl HasDelayedWork<Self> for View { self.work }
}

impl WorkItem for View {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        this.refresh();
        if this.with(|shown| shown.window.is_ok()) {
            // Only where it is queued already is it not queued.
            let _ = workqueue::system_highpri().enqueue_delayed(this, delay());
        }
    }
}

/// A view that is looked after until this is dropped.
pub(crate) struct WatchedView(Arc<View>);

impl WatchedView {
    pub(crate) fn new(view: Arc<View>) -> Self {
        stats::VIEWS.add_one();
        let _ = workqueue::system_highpri().enqueue_delayed(view.clone(), delay());
        Self(view)
    }
}

impl Deref for WatchedView {
    type Target = Arc<View>;

    fn deref(&self) -> &Arc<View> {
        &self.0
    }
}

impl Drop for WatchedView {
    fn drop(&mut self) {
        // Also so that no work is left when the module goes: it cannot while a file is open.
        sys::cancel(&self.0);
        stats::VIEWS.subtract_one();
    }
}
