// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hooks: a target's standing connections to tools.
//!
//! Each hook has a thread that connects to the tool, serves it, and connects again, with growing
//! pauses, until the hook is undone or the target goes. A hook belongs to the tool's VM as it is
//! registered, or at a unix socket to the user who asked for it, and not to a number or a path: it
//! ends with that VM, and does not connect to what another user listens at.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::limit::RateLimit;
use kvmmem_proto::message::HookInfo;
use rustix::net::Shutdown;

use crate::connect::connect_to_tool;

/// The most hooks of one target.
pub const MAX_PER_TARGET: usize = 8;

/// The pause before a tool is tried again: at first, and at most.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(1));

/// The owner of a path can cause these at will.
static WARNINGS: RateLimit = RateLimit::new(2);

/// A connected stream socket; reading and writing is all that is needed of it.
pub(crate) type Stream = Arc<File>;

/// The hooks of one target.
#[derive(Debug, Default)]
pub struct Hooks {
    list: Mutex<List>,
}

#[derive(Debug, Default)]
struct List {
    hooks: Vec<Arc<Hook>>,
    /// The target is gone: no hook is added any more.
    closed: bool,
}

/// One hook.
#[derive(Debug)]
pub struct Hook {
    endpoint: Endpoint,
    owner: Owner,
    state: Mutex<State>,
    stop: Condvar,
}

/// Whose the tool is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner {
    /// It is in the VM with this number.
    Vm(u64),
    /// It is on the host, and this is who asked for the hook.
    Host(Credentials),
}

#[derive(Debug, Default)]
struct State {
    stopped: bool,
    connected: bool,
    stream: Option<Stream>,
}

/// Why a hook is not made or undone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum HookError {
    /// The target has this hook.
    #[error("the target is hooked to {0} already")]
    Exists(Endpoint),
    /// The target does not have this hook.
    #[error("the target is not hooked to {0}")]
    Unknown(Endpoint),
    /// The target has [`MAX_PER_TARGET`] hooks.
    #[error("the target has {MAX_PER_TARGET} hooks already")]
    Full,
    /// The target is gone.
    #[error("the target is gone")]
    Gone,
}

impl Hooks {
    /// Adds a hook; the caller starts its thread.
    ///
    /// # Errors
    /// [`HookError`].
    pub fn add(&self, endpoint: Endpoint, owner: Owner) -> Result<Arc<Hook>, HookError> {
        let mut list = self.lock();
        if list.closed {
            return Err(HookError::Gone);
        }
        if list.hooks.iter().any(|hook| hook.endpoint == endpoint) {
            return Err(HookError::Exists(endpoint));
        }
        if list.hooks.len() >= MAX_PER_TARGET {
            return Err(HookError::Full);
        }
        let hook =
            Arc::new(Hook { endpoint, owner, state: Mutex::default(), stop: Condvar::new() });
        list.hooks.push(Arc::clone(&hook));
        Ok(hook)
    }

    /// Undoes a hook.
    ///
    /// # Errors
    /// [`HookError::Unknown`].
    pub fn remove(&self, endpoint: &Endpoint) -> Result<(), HookError> {
        let mut list = self.lock();
        let index = list.hooks.iter().position(|hook| hook.endpoint == *endpoint);
        let index = index.ok_or_else(|| HookError::Unknown(endpoint.clone()))?;
        list.hooks.swap_remove(index).stop();
        Ok(())
    }

    /// Undoes the hooks to tools in a VM that is gone; returns where those were.
    pub fn end_with(&self, vm: u64) -> Vec<Endpoint> {
        let mut list = self.lock();
        let (ended, left): (Vec<_>, Vec<_>) = std::mem::take(&mut list.hooks)
            .into_iter()
            .partition(|hook| hook.owner == Owner::Vm(vm));
        list.hooks = left;
        ended.iter().for_each(|hook| hook.stop());
        ended.iter().map(|hook| hook.endpoint.clone()).collect()
    }

    /// Undoes all hooks, for good.
    pub fn close(&self) {
        let mut list = self.lock();
        list.closed = true;
        for hook in list.hooks.drain(..) {
            hook.stop();
        }
    }

    /// How a list shows them.
    pub fn list(&self) -> Vec<HookInfo> {
        let info = |hook: &Arc<Hook>| HookInfo {
            endpoint: hook.endpoint.clone(),
            connected: hook.lock().connected,
        };
        self.lock().hooks.iter().map(info).collect()
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Hook {
    /// Where the tool listens.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Whose the tool is.
    pub fn owner(&self) -> Owner {
        self.owner
    }

    /// Connects and lets `serve` talk, again and again, until the hook is undone.
    pub(crate) fn run(&self, serve: impl Fn(&Self, Stream)) {
        let (shortest, longest) = BACK_OFF;
        let mut pause = shortest;
        loop {
            let began = Instant::now();
            match connect_to_tool(&self.endpoint, self.owner) {
                Ok(socket) => {
                    if let Some(stream) = self.open(socket) {
                        serve(self, stream);
                    }
                    self.close();
                }
                Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                    if WARNINGS.allow(Instant::now()).is_some() {
                        tracing::warn!(endpoint = %self.endpoint, %error, "cannot connect to the tool");
                    }
                }
                Err(error) => tracing::debug!(endpoint = %self.endpoint, %error, "no tool listens"),
            }
            // A tool that accepts and closes at once is no reason to hurry either.
            if began.elapsed() > longest {
                pause = shortest;
            }
            let (state, _) = self
                .stop
                .wait_timeout_while(self.lock(), pause, |state| !state.stopped)
                .unwrap_or_else(PoisonError::into_inner);
            if state.stopped {
                return;
            }
            pause = (pause * 2).min(longest);
        }
    }

    /// Whether the hook was undone.
    pub(crate) fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    /// Tells that the handshake is done.
    pub(crate) fn mark_connected(&self) {
        self.lock().connected = true;
    }

    /// Keeps the stream where [`Self::stop`] finds it; `None` where that came first.
    fn open(&self, socket: OwnedFd) -> Option<Stream> {
        let mut state = self.lock();
        if state.stopped {
            return None;
        }
        let stream = Arc::new(File::from(socket));
        state.stream = Some(Arc::clone(&stream));
        Some(stream)
    }

    fn close(&self) {
        let mut state = self.lock();
        state.connected = false;
        state.stream = None;
    }

    /// Ends the hook; its thread follows.
    fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        if let Some(stream) = &state.stream {
            // It fails only where the tool was faster.
            let _ = rustix::net::shutdown(stream, Shutdown::Both);
        }
        drop(state);
        self.stop.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
