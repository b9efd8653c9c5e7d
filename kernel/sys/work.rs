// SPDX-License-Identifier: GPL-2.0-only
//! Delayed work: cancelling, which `kernel::workqueue` lacks.

use kernel::bindings;
use kernel::sync::Arc;
use kernel::workqueue::{HasDelayedWork, Work, WorkItem};

/// Takes a delayed work from its queue, or waits until it has run. On return it is not queued.
pub(crate) fn cancel<T>(item: &Arc<T>)
where
    T: HasDelayedWork<T> + WorkItem<Pointer = Arc<T>>,
{
    let item = Arc::as_ptr(item);
    // SAFETY: `item` is alive, and `HasDelayedWork` promises that its work is part of a
    // `delayed_work`, which only the workqueue's functions touch. The caller may sleep.
    let was_queued = unsafe {
        let work = Work::raw_get(T::raw_get_work(item.cast_mut()));
        bindings::cancel_delayed_work_sync(kernel::container_of!(
            work,
            bindings::delayed_work,
            work
        ))
    };
    if was_queued {
        // SAFETY: queueing took one count, which running would have given back, and now will not.
        drop(unsafe { Arc::from_raw(item) });
    }
}
