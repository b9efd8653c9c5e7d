// SPDX-License-Identifier: GPL-2.0-only
//! Looks for changes of views by the host: at its interrupt, or by polling where it sends none.

use core::ops::Deref;

use kernel::bindings::CONFIG_HZ;
use kernel::sync::atomic::Relaxed;
use kernel::sync::{Arc, ArcBorrow};
use kernel::time::{msecs_to_jiffies, Jiffies};
use kernel::workqueue::{self, impl_has_delayed_work, WorkItem};

use crate::hypercall;
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
        if this.contents().window.is_ok() {
            this.watch(delay());
        }
    }
}

impl Interrupted for View {
    fn interrupted(this: ArcBorrow<'_, Self>) {
        // Not at once only where a change could not be followed a moment ago.
        Arc::from(this).watch(0);
    }
}

impl View {
    /// Has the work look from now on. At once where an interrupt may have come before there was
    /// anything to look at.
    pub(crate) fn begin_watch(self: &Arc<Self>) {
        let is_interrupted = self.has_interrupt.load(Relaxed);
        self.watch(if is_interrupted { 0 } else { delay() });
    }

    fn watch(self: &Arc<Self>, pause: Jiffies) {
        // An error says that it is queued already.
        let _ = workqueue::system_power_efficient().enqueue_delayed(self.clone(), pause);
    }
}

/// What an open file has of views, looked after until this is dropped.
pub(crate) struct WatchedView {
    view: Arc<View>,
    interrupt: Option<InterruptHandler<View>>,
}

impl WatchedView {
    pub(crate) fn new(view: Arc<View>) -> Self {
        // Without memory for the handler the view is polled.
        let interrupt =
            hypercall::gsi().and_then(|gsi| InterruptHandler::request(gsi, view.clone()).ok());
        view.has_interrupt.store(interrupt.is_some(), Relaxed);
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
    }
}
