// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The pause of a target while it is dumped.
//!
//! The broker resumes the target if this process does not ask for the pause again and again, so
//! that one that is killed, stopped or hangs does not keep a machine from running. A thread of its
//! own asks, for writing to a disk or a pipe may take any time.

use kvmmem_client::ClientError;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use serde::Serialize;

use crate::source::Operator;

/// How often the broker is asked: it waits 10 s.
const INTERVAL: Duration = Duration::from_secs(2);

/// A target that is paused; it runs again when this is dropped.
pub(super) struct Pause {
    /// Dropped, it ends the thread.
    end: Option<Sender<()>>,
    thread: Option<JoinHandle<Result<(), ClientError>>>,
    has_ended: Arc<AtomicBool>,
    was_running: bool,
    began: Instant,
}

/// What the record says of a pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Paused {
    /// Whether the target ran before, and runs again.
    was_running: bool,
    /// How long it was stopped for this dump, milliseconds.
    ms: u64,
}

impl Pause {
    /// Keeps the target paused that `was_running` before the pause `began`.
    pub(super) fn keep(operator: Operator, was_running: bool, began: Instant) -> Result<Self> {
        let (end, ended) = channel();
        let has_ended = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&has_ended);
        let Operator { mut admin, target, .. } = operator;
        let keep = move || {
            while ended.recv_timeout(INTERVAL) == Err(RecvTimeoutError::Timeout) {
                if let Err(error) = admin.pause(&target) {
                    flag.store(true, Ordering::Relaxed);
                    return Err(error);
                }
            }
            admin.resume(&target)
        };
        let thread = std::thread::Builder::new().name("pause".into()).spawn(keep);
        let thread = Some(thread.context("cannot start a thread")?);
        Ok(Self { end: Some(end), thread, has_ended, was_running, began })
    }

    /// Whether it has ended by itself.
    pub(super) fn has_ended(&self) -> bool {
        self.has_ended.load(Ordering::Relaxed)
    }

    /// Lets the target run again. Fails where the target ran already, or cannot be resumed.
    pub(super) fn end(mut self) -> Result<Paused> {
        self.join()
            .context("the target was not paused to the end of the dump, or is still paused")?;
        let ms = u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX);
        Ok(Paused { was_running: self.was_running, ms })
    }

    fn join(&mut self) -> Result<()> {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| anyhow!("the thread that keeps the pause has ended"))??;
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

impl std::fmt::Display for Paused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { was_running, ms } = self;
        let seconds = Duration::from_millis(*ms).as_secs_f64();
        match was_running {
            true => write!(f, "the target was paused for {seconds:.3} s"),
            false => write!(f, "the target was not running, and is not now"),
        }
    }
}
