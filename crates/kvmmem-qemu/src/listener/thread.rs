// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A thread that waits for one listener's socket, where there is no reactor that waits for many.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};

use super::{Listener, News, Next};
use crate::monitor::{Monitor, Run};
use crate::qmp::Qmp;
use crate::questions::Questions;

/// How long a QEMU that sends more than one step takes is not listened to.
const FLOOD_PAUSE: Duration = Duration::from_millis(5);

/// Virtual memory of the thread's stack, bytes; next to none of it is ever touched.
const STACK: usize = 256 * 1024;

/// A listener with its thread. Dropping it closes the listener.
#[derive(Debug)]
pub(super) struct Listening {
    listener: Arc<Listener>,
    questions: Questions,
}

impl Listening {
    /// As [`Listener::new`].
    ///
    /// # Errors
    /// Where there are no file descriptors or threads left.
    pub(super) fn start(
        monitor: Arc<Monitor>,
        find: impl Fn() -> Option<Qmp> + Send + Sync + 'static,
        tell: impl FnMut(&mut Qmp, News) -> Next + Send + 'static,
        silence: Duration,
        run: Arc<Run>,
    ) -> io::Result<Self> {
        let wake = rustix::event::eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let wake = Arc::new(wake);
        let waker = Arc::clone(&wake);
        let listener = Listener::new(monitor, find, tell, silence, run, move || {
            // It fails only where the counter is at its end, and then the thread wakes as well.
            let _ = rustix::io::write(&waker, &1u64.to_ne_bytes());
        });
        let stepped = Arc::clone(&listener);
        let thread = std::thread::Builder::new().name("qmp-monitor".into()).stack_size(STACK);
        thread.spawn(move || wait(&stepped, &wake))?;
        let questions = Questions::new(Arc::clone(&listener) as _);
        Ok(Self { listener, questions })
    }

    /// What the VM's QEMU can be asked.
    pub(super) fn questions(&self) -> &Questions {
        &self.questions
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.listener.close();
    }
}

fn wait(listener: &Listener, wake: &OwnedFd) {
    while let Some(step) = listener.step() {
        let now = Instant::now();
        let mut pause = step.until.map(|until| until.saturating_duration_since(now));
        let socket = listener.socket().filter(|_| !step.is_behind);
        if step.is_behind {
            pause = Some(pause.unwrap_or(FLOOD_PAUSE).min(FLOOD_PAUSE));
        }
        let pause = pause.and_then(|pause| Timespec::try_from(pause).ok());
        let mut fds = vec![PollFd::new(wake, PollFlags::IN)];
        fds.extend(socket.as_deref().map(|socket| PollFd::new(socket, PollFlags::IN)));
        // An interrupted wait is a short one. No other failure is possible but for want of memory.
        let _ = rustix::event::poll(&mut fds, pause.as_ref());
        // Whether there was anything to read does not matter.
        let _ = rustix::io::read(wake, &mut [0; 8]);
    }
}
