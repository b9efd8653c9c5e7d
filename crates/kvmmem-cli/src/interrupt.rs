// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Signals that ask a verb to come to its end.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use signal_hook::consts::{SIGHUP, SIGINT, SIGQUIT, SIGTERM};

/// Whether SIGINT, SIGTERM, SIGHUP or SIGQUIT has come. The second one of them ends the process at
/// once.
#[derive(Clone)]
pub(crate) struct Interrupt {
    flag: Arc<AtomicBool>,
    /// Readable from then on.
    wake: Arc<UnixStream>,
}

impl Interrupt {
    /// From now on the signals are caught.
    pub(crate) fn catch() -> Result<Self> {
        let flag = Arc::new(AtomicBool::new(false));
        let (wake, waker) = UnixStream::pair().context("cannot handle signals")?;
        for signal in [SIGINT, SIGTERM, SIGHUP, SIGQUIT] {
            // Registered first, it sees the flag of the signal before.
            signal_hook::flag::register_conditional_default(signal, Arc::clone(&flag))
                .and_then(|_| signal_hook::flag::register(signal, Arc::clone(&flag)))
                .and_then(|_| signal_hook::low_level::pipe::register(signal, waker.try_clone()?))
                .context("cannot handle signals")?;
        }
        Ok(Self { flag, wake: Arc::new(wake) })
    }

    /// What no signal ends.
    #[cfg(test)]
    pub(crate) fn never() -> Self {
        let (wake, other) = UnixStream::pair().unwrap();
        // Closed, it would make this one readable.
        std::mem::forget(other);
        Self { flag: Arc::default(), wake: Arc::new(wake) }
    }

    pub(crate) fn has_come(&self) -> bool {
        self.flag.load(Ordering::Relaxed)
    }

    /// Waits for a signal for at most `limit`; returns whether one has come.
    ///
    /// # Errors
    /// Those of `poll`.
    pub(crate) fn wait(&self, limit: Duration) -> io::Result<bool> {
        let start = Instant::now();
        loop {
            let left = limit.saturating_sub(start.elapsed());
            if self.has_come() || left.is_zero() {
                return Ok(self.has_come());
            }
            let left = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            match poll(&mut [PollFd::new(self, PollFlags::IN)], Some(&left)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// For `poll`: readable once a signal has come.
impl AsFd for Interrupt {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}
