// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hooks: a target's standing connections to tools.
//!
//! A hook connects to its tool, is served, and connects again, with growing pauses, until it is
//! undone or the target goes (`driver`). A hook belongs to the tool's VM as it is registered, or
//! at a unix socket to the user who asked for it, and not to a number or a path: it ends with that
//! VM, and does not connect to what another user listens at.

mod calls;
mod count;
mod driver;

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::message::{HookInfo, Refusal};
use rustix::net::Shutdown;

use crate::core::call_error::CallError;
use crate::reactor::{Reactor, Token};
use crate::sync::lock;

/// The most hooks of one target.
pub(crate) const MAX_PER_TARGET: usize = 8;

/// The hooks of one target.
#[derive(Debug, Default)]
pub(crate) struct Hooks {
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
pub(crate) struct Hook {
    endpoint: Endpoint,
    owner: Owner,
    state: Mutex<State>,
}

/// Whose the tool is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Owner {
    /// It is in the VM with this number.
    Vm(u64),
    /// It is on the host, and this is who asked for the hook.
    Host(Credentials),
}

#[derive(Debug, Default)]
struct State {
    stopped: bool,
    connected: bool,
    stream: Option<Arc<OwnedFd>>,
    /// What drives it, between its start and its end.
    driver: Option<(Reactor, Token)>,
    /// A worker is at work on it.
    is_busy: bool,
}

/// Why a hook is not made or undone.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HookError {
    #[error("the target is hooked to {0} already")]
    Exists(Endpoint),
    #[error("the target is not hooked to {0}")]
    Unknown(Endpoint),
    #[error("the target has {MAX_PER_TARGET} hooks already")]
    Full,
    #[error("the target is gone")]
    Gone,
}

impl From<HookError> for CallError {
    fn from(error: HookError) -> Self {
        let refusal = match error {
            HookError::Exists(_) => Refusal::Exists,
            HookError::Unknown(_) | HookError::Gone => Refusal::Unknown,
            HookError::Full => Refusal::Limit,
        };
        Self::new(refusal, error)
    }
}

impl Hooks {
    /// Adds a hook; the caller starts its driver.
    pub(crate) fn add(&self, endpoint: Endpoint, owner: Owner) -> Result<Arc<Hook>, HookError> {
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
        let hook = Arc::new(Hook { endpoint, owner, state: Mutex::default() });
        list.hooks.push(Arc::clone(&hook));
        Ok(hook)
    }

    /// Undoes a hook; returns whose it was.
    pub(crate) fn remove(&self, endpoint: &Endpoint) -> Result<Owner, HookError> {
        let mut list = self.lock();
        let index = list.hooks.iter().position(|hook| hook.endpoint == *endpoint);
        let index = index.ok_or_else(|| HookError::Unknown(endpoint.clone()))?;
        let hook = list.hooks.swap_remove(index);
        hook.stop();
        Ok(hook.owner)
    }

    /// Undoes the hooks that `is_meant` picks, without an operator's request; returns them.
    pub(crate) fn end(&self, is_meant: impl Fn(&Arc<Hook>) -> bool) -> Vec<Arc<Hook>> {
        let mut list = self.lock();
        let ended: Vec<_> = list.hooks.extract_if(.., |hook| is_meant(hook)).collect();
        ended.iter().for_each(|hook| hook.stop());
        ended
    }

    /// Whether one of them is to a tool in this VM.
    pub(crate) fn has_owner(&self, vm: u64) -> bool {
        self.lock().hooks.iter().any(|hook| hook.owner == Owner::Vm(vm))
    }

    /// Undoes all hooks, for good.
    pub(crate) fn close(&self) {
        let mut list = self.lock();
        list.closed = true;
        for hook in list.hooks.drain(..) {
            hook.stop();
        }
    }

    /// How a list shows them.
    pub(crate) fn list(&self) -> Vec<HookInfo> {
        let info = |hook: &Arc<Hook>| HookInfo {
            endpoint: hook.endpoint.clone(),
            connected: hook.lock().connected,
        };
        self.lock().hooks.iter().map(info).collect()
    }

    fn lock(&self) -> MutexGuard<'_, List> {
        lock(&self.list)
    }
}

impl Hook {
    /// Where the tool listens.
    pub(crate) fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// Whose the tool is.
    pub(crate) fn owner(&self) -> Owner {
        self.owner
    }

    /// Whether the hook was undone.
    pub(crate) fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    /// Tells that the handshake is done.
    pub(crate) fn mark_connected(&self) {
        self.lock().connected = true;
    }

    /// Keeps the stream where [`Self::stop`] finds it; `false` where that came first.
    fn open(&self, stream: &Arc<OwnedFd>) -> bool {
        let mut state = self.lock();
        if !state.stopped {
            state.stream = Some(Arc::clone(stream));
        }
        !state.stopped
    }

    fn close(&self) {
        let mut state = self.lock();
        state.connected = false;
        state.stream = None;
    }

    /// Ends the hook; its driver follows.
    fn stop(&self) {
        let mut state = self.lock();
        state.stopped = true;
        if let Some(stream) = &state.stream {
            // It fails only where the tool was faster.
            let _ = rustix::net::shutdown(stream, Shutdown::Both);
        }
        state.nudge();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

impl State {
    /// Has the driver look at once, unless it serves the tool: then it looks when it is done.
    fn nudge(&self) {
        let is_serving = self.is_busy && self.stream.is_some();
        if let Some((reactor, token)) = self.driver.as_ref().filter(|_| !is_serving)
            && let Err(error) = reactor.arm(*token, None, Some(Instant::now()))
        {
            tracing::error!(%error, "a hook does not end");
        }
    }
}
