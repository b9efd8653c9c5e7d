// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the QEMUs of targets report: the reactor waits for their QMP sockets and steps their
//! listeners. A target with QMP has no thread; what asks its QEMU is done by the broker's service
//! workers.

use std::fmt;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kvmmem_qemu::listener::{Listener, ListenerAction, VmEvent};
use kvmmem_qemu::monitor::Monitor;
use kvmmem_qemu::qmp::Qmp;
use kvmmem_qemu::questions::Questions;

use crate::reactor::{READABLE, Reactor, Token};
use crate::workers::{Party, Workers};

/// How long a QEMU that sends more than one step takes is not listened to: others come first.
const FLOOD_PAUSE: Duration = Duration::from_millis(20);

/// A target's listener, closed when this is dropped.
pub(crate) struct Listening {
    listener: Arc<Listener>,
    questions: Questions,
}

/// A registration of the reactor's, by which a listener is stepped.
struct Steps {
    reactor: Reactor,
    token: OnceLock<Token>,
    /// A step is due that the last one did not know of.
    is_due: AtomicBool,
    is_stepping: AtomicBool,
}

impl Listening {
    /// Listens to the QEMU of a target by its monitor. `find` connects where there is no
    /// connection; `handle` gets what QEMU reports. Both may ask QEMU.
    pub(super) fn start(
        (reactor, workers): (&Reactor, &Workers),
        target: u64,
        monitor: Arc<Monitor>,
        find: impl Fn() -> Option<Qmp> + Send + Sync + 'static,
        handle: impl FnMut(VmEvent<'_>) -> ListenerAction + Send + 'static,
        silence: Duration,
    ) -> io::Result<Self> {
        workers.start()?;
        let workers = workers.clone();
        let run = move |job| {
            workers.run(Party::Target(target), job);
            Ok(())
        };
        let steps = Arc::new(Steps {
            reactor: reactor.clone(),
            token: OnceLock::new(),
            is_due: AtomicBool::new(false),
            is_stepping: AtomicBool::new(false),
        });
        let waker = Arc::clone(&steps);
        let listener =
            Listener::new(monitor, find, handle, silence, Arc::new(run), move || waker.wake());
        let stepped = Arc::clone(&listener);
        let handler = Arc::clone(&steps);
        let token = reactor.insert(Arc::new(move |_, _, _| handler.step(&stepped)))?;
        let _ = steps.token.set(token);
        // Not `wake`: one before this found no token, and the next would count on its step.
        steps.arm(None, Some(Instant::now()));
        let questions = Questions::new(Arc::clone(&listener) as _);
        Ok(Self { listener, questions })
    }

    /// What the target's QEMU can be asked.
    pub(crate) fn questions(&self) -> &Questions {
        &self.questions
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        self.listener.close();
    }
}

impl fmt::Debug for Listening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Listening").field("listener", &self.listener).finish_non_exhaustive()
    }
}

impl Steps {
    /// Has the listener stepped at once. A step itself sees what it causes.
    fn wake(&self) {
        let is_own = self.is_stepping.load(Ordering::Acquire) && self.reactor.is_current();
        if !is_own && !self.is_due.swap(true, Ordering::AcqRel) {
            self.arm(None, Some(Instant::now()));
        }
    }

    fn step(&self, listener: &Listener) {
        self.is_due.store(false, Ordering::Release);
        self.is_stepping.store(true, Ordering::Release);
        let step = listener.step();
        self.is_stepping.store(false, Ordering::Release);
        let Some(step) = step else {
            self.token.get().into_iter().for_each(|token| self.reactor.remove(*token));
            return;
        };
        let mut until = step.until;
        if step.is_behind {
            let pause = Instant::now() + FLOOD_PAUSE;
            until = Some(until.map_or(pause, |until| until.min(pause)));
        }
        self.arm(listener.socket().filter(|_| !step.is_behind), until);
        // It may have become due before there was anything to wake.
        if self.is_due.load(Ordering::Acquire) {
            self.arm(None, Some(Instant::now()));
        }
    }

    fn arm(&self, socket: Option<Arc<OwnedFd>>, until: Option<Instant>) {
        let Some(token) = self.token.get() else { return };
        let fd = socket.as_ref().map(|socket| (socket, READABLE));
        if let Err(error) = self.reactor.arm(*token, fd, until) {
            let pause = if error.kind() == io::ErrorKind::AlreadyExists {
                // A listener before this one has the same socket until it has ended.
                FLOOD_PAUSE
            } else {
                tracing::error!(%error, "cannot wait for a QEMU's messages; a later attempt may succeed");
                Duration::from_secs(1)
            };
            // It fails for file descriptors alone.
            let _ = self.reactor.arm(*token, None, Some(Instant::now() + pause));
        }
    }
}
