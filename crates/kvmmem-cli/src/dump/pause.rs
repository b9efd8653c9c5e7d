// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The pause of a target while it is dumped.
//!
//! The broker resumes the target if this process does not ask for the pause again and again, so
//! that one that is killed, stopped or hangs does not keep a machine from running. A thread of its
//! own asks, for writing to a disk or a pipe may take any time. It stops to ask where nothing is
//! written for [`STALL`], as to a network file system whose server is gone.

use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use serde::Serialize;

use crate::source::Operator;

/// How often the broker is asked: it waits 10 s.
const INTERVAL: Duration = Duration::from_secs(2);

/// How long the dump may stand still. A slow disk takes a while for all that was written since the
/// last checkpoint.
const STALL: Duration = Duration::from_secs(120);

/// A target that is paused; it runs again when this is dropped.
pub(super) struct Pause {
    /// Dropped, it ends the thread.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<Result<()>>>,
    state: Arc<State>,
    was_running: bool,
    began: Instant,
}

/// State that the dump and the thread share.
struct State {
    /// When the dump got on last.
    progress: Mutex<Instant>,
    /// Why the pause has ended by itself.
    ended: OnceLock<String>,
}

/// A pause, in the record.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct PauseReport {
    /// Whether the target ran before, and runs again.
    was_running: bool,
    /// How long it was stopped for this dump, milliseconds.
    ms: u64,
}

impl Pause {
    /// Keeps the target paused that `was_running` before the pause `began`.
    pub(super) fn keep(operator: Operator, was_running: bool, began: Instant) -> Result<Self> {
        let (end, ended) = channel();
        let progress = Mutex::new(Instant::now());
        let state = Arc::new(State { progress, ended: OnceLock::new() });
        let told = Arc::clone(&state);
        let Operator { mut admin, target, .. } = operator;
        let keep = move || {
            let held = told.hold(&ended, INTERVAL, STALL, || Ok(admin.pause(&target).map(drop)?));
            if let Err(error) = &held {
                told.ended.get_or_init(|| format!("{error:#}"));
            }
            // Also where the dump stands still; the broker may be gone.
            let resumed = admin.resume(&target);
            held.and_then(|()| Ok(resumed?))
        };
        let thread = std::thread::Builder::new().name("pause".into()).spawn(keep);
        let thread = Some(thread.context("cannot start a thread")?);
        Ok(Self { end: Some(end), thread, state, was_running, began })
    }

    /// Records progress of the dump. Fails where the target runs again already.
    pub(super) fn check(&self) -> Result<()> {
        *self.state.progress.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
        match self.state.ended.get() {
            Some(reason) => bail!("{reason}"),
            None => Ok(()),
        }
    }

    /// Lets the target run again. Fails where the target ran already, or cannot be resumed.
    pub(super) fn end(mut self) -> Result<PauseReport> {
        self.join()
            .context("the target was not paused to the end of the dump, or is still paused")?;
        let ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(PauseReport { was_running: self.was_running, ms })
    }

    fn join(&mut self) -> Result<()> {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow!("the thread that keeps the pause has ended"))??;
        }
        Ok(())
    }
}

impl State {
    /// Asks for the pause in each interval, until it is to end. Fails where that fails, and where
    /// the dump stands still.
    fn hold(
        &self,
        ended: &Receiver<()>,
        interval: Duration,
        stall: Duration,
        mut ask: impl FnMut() -> Result<()>,
    ) -> Result<()> {
        while ended.recv_timeout(interval) == Err(RecvTimeoutError::Timeout) {
            if self.progress.lock().unwrap_or_else(PoisonError::into_inner).elapsed() >= stall {
                let words = format!("nothing was written for {stall:?}, so the target runs again");
                tracing::warn!("{words}: this dump will fail");
                bail!(words);
            }
            ask()?;
        }
        Ok(())
    }
}

impl Drop for Pause {
    fn drop(&mut self) {
        if self.thread.is_some()
            && let Err(error) = self.join()
        {
            tracing::warn!("{error:#}");
        }
    }
}

impl std::fmt::Display for PauseReport {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { was_running, ms } = self;
        let seconds = Duration::from_millis(*ms).as_secs_f64();
        match was_running {
            true => write!(f, "the target was paused for {seconds:.3} s"),
            false => write!(f, "the target was not running, and is not now"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pause_ends_where_the_dump_stands_still() {
        let state = State { progress: Mutex::new(Instant::now()), ended: OnceLock::new() };
        let (end, ended) = channel();
        let (interval, long) = (Duration::from_millis(1), Duration::from_secs(3600));
        // As long as it gets on, it is kept; until asking fails.
        let mut asked = 0;
        let held = state.hold(&ended, interval, long, || {
            asked += 1;
            if asked == 5 { bail!("refused") } else { Ok(()) }
        });
        assert_eq!((held.unwrap_err().to_string(), asked), ("refused".to_owned(), 5));
        let held = state.hold(&ended, interval, Duration::ZERO, || panic!("asked"));
        let error = held.unwrap_err().to_string();
        assert!(error.starts_with("nothing was written for"), "{error}");
        // The dump asked it to end.
        drop(end);
        state.hold(&ended, interval, Duration::ZERO, || panic!("asked")).unwrap();
    }
}
