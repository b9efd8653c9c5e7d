// SPDX-License-Identifier: GPL-2.0-only
//! Polls views for changes by the host, which sends no interrupt.

use core::ops::Deref;

use kernel::bindings::CONFIG_HZ;
use kernel::sync::Arc;
use kernel::time::{msecs_to_jiffies, Jiffies};
use kernel::workqueue::{self, impl_has_delayed_work, WorkItem};

use crate::stats;
use crate::sys::work;
use crate::view::View;

/// Between two looks at a view, in milliseconds; a whole number of ticks, so 10 where there are 100
/// ticks a second.
const DELAY_MS: u32 = 4;

/// Between two looks at a slot at which nothing happens.
const LONGEST_PAUSE_MS: u32 = 64;

/// The longest time in milliseconds from a change to the event, on a machine that is not
/// overloaded: a delay may last a tick longer than asked for, and looking takes its time.
pub(crate) fn event_ms() -> u32 {
    2 + ((delay() as u32 + 1) * 1000).div_ceil(CONFIG_HZ)
}

/// Between two looks at a view.
pub(crate) fn delay() -> Jiffies {
    msecs_to_jiffies(DELAY_MS)
}

/// The most between two looks at a slot.
pub(crate) fn longest_pause() -> Jiffies {
    msecs_to_jiffies(LONGEST_PAUSE_MS)
}

impl_has_delayed_work! {
    impl HasDelayedWork<Self> for View { self.work }
}

impl WorkItem for View {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        // What cannot be followed now is tried again at the next look.
        let _ = this.refresh();
        if this.with(|contents| contents.window.is_ok()) {
            // An error says that it is queued already.
            let _ = workqueue::system_power_efficient().enqueue_delayed(this, delay());
        }
    }
}

/// A view that is looked after until this is dropped.
pub(crate) struct WatchedView(Arc<View>);

impl WatchedView {
    pub(crate) fn new(view: Arc<View>) -> Self {
        stats::VIEWS.add_one();
        let _ = workqueue::system_power_efficient().enqueue_delayed(view.clone(), delay());
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
        work::cancel(&self.0);
        stats::VIEWS.subtract_one();
    }
}
