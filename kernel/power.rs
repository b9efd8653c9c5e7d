// SPDX-License-Identifier: GPL-2.0-only
//! Shutdown and sleep of this machine. Nothing new is mapped once it goes down or sleeps.
//!
//! Before it goes down, or starts another kernel, v1's pages are restored. It does not sleep while
//! memory of a target is in use: an image of this machine would hold it, and where the image is
//! woken there may be no target, or another one at the same addresses.

use kernel::prelude::*;
use kernel::sync::atomic::{Acquire, Atomic, Full, Relaxed, Release};
use kernel::time::delay::fsleep;
use kernel::time::Delta;

use crate::hypercall;
use crate::slots;
use crate::stats;
use crate::sys::power::Event;

const AWAKE: i32 = 0;
const ASLEEP: i32 = 1;
const DOWN: i32 = 2;

static PHASE: Atomic<i32> = Atomic::new(AWAKE);

/// Number of calls that are about to use memory of a target.
static BEGINNING: Atomic<i64> = Atomic::new(0);

/// Counts a call that is about to use memory of a target, until it is dropped: from then on a
/// counter of [`stats`] or a slot says that it is used.
pub(crate) struct UseGuard(());

impl UseGuard {
    /// `EAGAIN` while the machine goes down or sleeps.
    pub(crate) fn begin() -> Result<Self> {
        // Either this call sees the phase, or who set the phase sees this call.
        BEGINNING.fetch_add(1, Full);
        let this = Self(());
        if PHASE.load(Relaxed) == AWAKE {
            Ok(this)
        } else {
            Err(EAGAIN)
        }
    }
}

impl Drop for UseGuard {
    fn drop(&mut self) {
        BEGINNING.fetch_add(-1, Release);
    }
}

/// Called at each event of the machine. `EBUSY` where it must not sleep.
pub(crate) fn on_event(event: Event) -> Result {
    match event {
        Event::Down => {
            go_down();
            Ok(())
        }
        Event::Sleep => go_to_sleep(),
        Event::Awake => {
            // Not where the machine goes down.
            let _ = PHASE.cmpxchg(ASLEEP, AWAKE, Full);
            Ok(())
        }
    }
}

/// A kernel that is started next would take replaced pages for ordinary RAM and write into the
/// target.
fn go_down() {
    const TRIES: u32 = 5000;
    PHASE.xchg(DOWN, Full);
    // A call that waits for the host's broker takes up to 2 s.
    for _ in 0..TRIES {
        if BEGINNING.load(Acquire) == 0 {
            break;
        }
        fsleep(Delta::from_millis(1));
    }
    hypercall::close_pages();
}

fn go_to_sleep() -> Result {
    PHASE.cmpxchg(AWAKE, ASLEEP, Full).map_err(|_| EBUSY)?;
    let is_used = BEGINNING.load(Acquire) > 0 || stats::is_used() || slots::is_any_bound();
    if is_used {
        let _ = PHASE.cmpxchg(ASLEEP, AWAKE, Full);
        pr_notice!("the machine does not sleep while memory of a target is in use\n");
        return Err(EBUSY);
    }
    Ok(())
}
