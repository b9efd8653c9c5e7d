// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Ctrl-C and SIGTERM. While a [`Watch`] lives they are recorded, so that its owner can end the
//! processes that it started; otherwise they end this process at once.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use anyhow::{Context as _, Result};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

struct Flags {
    unwatched: Arc<AtomicBool>,
    seen: Arc<AtomicBool>,
}

static FLAGS: OnceLock<Flags> = OnceLock::new();

/// While this lives, the signals are noted. There is one at a time.
pub(crate) struct Watch(());

/// Starts to watch for the signals.
pub(crate) fn watch() -> Result<Watch> {
    if let Some(flags) = FLAGS.get() {
        flags.unwatched.store(false, Ordering::Relaxed);
        return Ok(Watch(()));
    }
    let flags = FLAGS.get_or_init(|| Flags { unwatched: Arc::default(), seen: Arc::default() });
    for signal in [SIGINT, SIGTERM] {
        flag::register_conditional_default(signal, Arc::clone(&flags.unwatched))
            .and_then(|_| flag::register(signal, Arc::clone(&flags.seen)))
            .context("cannot watch for Ctrl-C")?;
    }
    Ok(Watch(()))
}

/// Whether one came.
pub(crate) fn was_seen() -> bool {
    FLAGS.get().is_some_and(|flags| flags.seen.load(Ordering::Relaxed))
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Some(flags) = FLAGS.get() {
            flags.unwatched.store(true, Ordering::Relaxed);
        }
    }
}
