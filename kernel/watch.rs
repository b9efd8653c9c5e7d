// SPDX-License-Identifier: GPL-2.0-only
//! Looks for changes of views by the host: at its interrupt, or by polling where it sends none.

use core::ops::Deref;

use kernel::bindings::CONFIG_HZ;
use kernel::sync::atomic::Relaxed;
use kernel::sync::{Arc, ArcBorrow};
use kernel::time::{msecs_to_jiffies, Jiffies};
use kernel::workqueue::{self, impl_has_delayed_work, WorkItem};

use crate::hypercall;
use crate::stats;
use crate::sys::interrupt::{InterruptHandler, Interrupted};
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
        let is_followed = this.refresh().is_ok();
        if is_followed && this.has_interrupt.load(Relaxed) {
            return;
        }
        if this.with(|contents| contents.window.is_ok()) {
            // An error says that it is queued already.
            let _ = workqueue::system_power_efficient().enqueue_delayed(this, delay());
        }
    }
}

impl Interrupted for View {
    fn interrupted(this: ArcBorrow<'_, Self>) {
        // Not at once only where a change could not be followed a moment ago.
        let view: Arc<Self> = this.into();
        let _ = workqueue::system_power_efficient().enqueue_delayed(view, 0);
    }
}

/// A view that is looked after until this is dropped.
pub(crate) struct WatchedView {
    view: Arc<View>,
    interrupt: Option<InterruptHandler<View>>,
}

impl WatchedView {
    pub(crate) fn new(view: Arc<View>) -> Self {
        stats::VIEWS.add_one();
        let gsi = hypercall::gsi().filter(|_| view.host().is_hypercall());
        // Without memory for the handler the view is polled.
        let interrupt = gsi.and_then(|gsi| InterruptHandler::request(gsi, view.clone()).ok());
        view.has_interrupt.store(interrupt.is_some(), Relaxed);
        // What has changed before the handler was there raised no interrupt.
        let pause = if interrupt.is_some() { 0 } else { delay() };
        let _ = workqueue::system_power_efficient().enqueue_delayed(view.clone(), pause);
        Self { view, interrupt }
    }
}

impl Deref for WatchedView {
    type Target = Arc<View>;

    fn deref(&self) -> &Arc<View> {
        &self.view
    }
}

impl Drop for WatchedView {
    fn drop(&mut self) {
        // First, so that nothing is queued any more.
        drop(self.interrupt.take());
        // Also so that no work is left when the module goes: it cannot while a file is open.
        work::cancel(&self.view);
        stats::VIEWS.subtract_one();
    }
}
