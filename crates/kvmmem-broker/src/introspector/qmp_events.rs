// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The thread that acts upon what happens in an introspector's QEMU, and tries again what could not
//! be taken back.

use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use super::Introspector;
use super::monitor::{Monitor, News};
use super::unplug::Cause;
use super::view::{Phase, View, lock};

/// How soon a view that is stuck is tried again: at first, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// How long each try waits for the guest.
pub(super) const TRY_LIMIT: Duration = Duration::from_millis(200);

/// Starts the thread; it ends with the introspector.
pub(super) fn start(introspector: &Arc<Introspector>) -> std::io::Result<()> {
    let (monitor, known) = (Arc::clone(&introspector.monitor), News::default());
    let introspector = Arc::downgrade(introspector);
    std::thread::Builder::new()
        .name("introspector".into())
        .spawn(move || run(&introspector, &monitor, known))?;
    Ok(())
}

fn run(introspector: &Weak<Introspector>, monitor: &Monitor, mut known: News) {
    let mut pause = BACK_OFF.0;
    let mut next: Option<Instant> = None;
    loop {
        let timeout = next.map(|next| next.saturating_duration_since(Instant::now()));
        let Some(news) = monitor.wait_news(known, timeout) else { return };
        let Some(introspector) = introspector.upgrade() else { return };
        introspector.act(known, news);
        if news.returns != known.returns {
            // What happened meanwhile nobody has said.
            next = Some(Instant::now());
        }
        known = news;
        if next.is_some_and(|next| next <= Instant::now()) {
            introspector.try_again();
            pause = (pause * 2).min(BACK_OFF.1);
            next = Some(Instant::now() + pause);
        }
        if introspector.stuck().is_empty() {
            (pause, next) = (BACK_OFF.0, None);
        } else {
            next = next.or_else(|| Some(Instant::now() + pause));
        }
    }
}

impl Introspector {
    fn act(&self, known: News, news: News) {
        if news.losses != known.losses {
            self.end(Cause::Lost, |view| is_whole(view) && view.since.losses < news.losses);
        }
        if news.resets != known.resets {
            self.end(Cause::Reset, |view| is_whole(view) && view.since.resets < news.resets);
        }
        if news.deletions != known.deletions {
            let is_damaged = |view: &View| {
                view.phase() == Phase::Open && lock(&view.plug).is_damaged(&self.monitor)
            };
            self.end(Cause::Reset, is_damaged);
        }
    }

    fn stuck(&self) -> Vec<Arc<View>> {
        self.views().into_iter().filter(|view| view.phase() == Phase::Stuck).collect()
    }

    /// Tries to take back what could not be taken back.
    pub(super) fn try_again(&self) {
        let stuck: Vec<Arc<View>> =
            self.stuck().into_iter().filter(|view| view.claim_stuck()).collect();
        if !stuck.is_empty() {
            self.unplug(&stuck, Instant::now() + TRY_LIMIT);
        }
    }
}

/// Whether nobody has ended the view yet.
fn is_whole(view: &View) -> bool {
    matches!(view.phase(), Phase::Opening | Phase::Open)
}
