// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A broker made of one token.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, Weak};

use kvmmem_abi::errno::KvmError;
use kvmmem_client::vmm::{Caller, Rights, Scope, ViewCounters};
use kvmmem_vmm::introspect::source::{
    PageGrant, TargetEvents, TargetMemory, Token, TokenSource, ViewGrant,
};

use crate::fixture::{TOKEN, Target};

/// Knows one token, which opens the target as often as it is used; the n-th use is grant n and, if
/// so, view n.
pub(crate) struct OneToken {
    scope: Scope,
    state: Mutex<State>,
    answers: Condvar,
}

#[derive(Default)]
pub(crate) struct State {
    pub(crate) target: Option<Arc<Target>>,
    pub(crate) asked: usize,
    pub(crate) events: Option<Weak<dyn TargetEvents>>,
    /// Views that are attached.
    pub(crate) open: BTreeMap<u64, Caller>,
    /// What was told of views, and whether that was their end.
    pub(crate) told: Vec<(u64, ViewCounters, bool)>,
    /// What happens between the answer to ATTACH and its arrival in the table of views.
    pub(crate) ends_at_once: bool,
    /// Whether the broker is asked in vain.
    is_silent: bool,
}

impl OneToken {
    pub(crate) fn new(target: Arc<Target>, scope: Scope) -> Arc<Self> {
        let state = State { target: Some(target), ..State::default() };
        Arc::new(Self { scope, state: Mutex::new(state), answers: Condvar::new() })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// How many tokens were asked for.
    pub(crate) fn asked(&self) -> usize {
        self.state().asked
    }

    /// What takes the machine's events, once it has said where that is.
    pub(crate) fn events(&self) -> Arc<dyn TargetEvents> {
        self.state().events.as_ref().and_then(Weak::upgrade).unwrap()
    }

    /// Answers nothing until [`OneToken::speak`].
    pub(crate) fn be_silent(&self) {
        self.state().is_silent = true;
    }

    /// Answers what was asked.
    pub(crate) fn speak(&self) {
        self.state().is_silent = false;
        self.answers.notify_all();
    }

    fn use_token(&self, token: &Token) -> Result<(u64, Arc<Target>), KvmError> {
        let mut state = self.state();
        state.asked += 1;
        let number = state.asked as u64;
        state = self.answers.wait_while(state, |state| state.is_silent).unwrap();
        if token.to_bytes().as_slice() != TOKEN.map(u64::to_le_bytes).as_flattened() {
            return Err(KvmError::NoEnt);
        }
        Ok((number, state.target.clone().unwrap()))
    }
}

impl TokenSource for OneToken {
    fn redeem(&self, token: &Token) -> Result<PageGrant, KvmError> {
        let (grant, target) = self.use_token(token)?;
        Ok(PageGrant { grant, target, scope: self.scope.clone() })
    }

    fn is_revoked(&self, _grant: u64) -> bool {
        false
    }

    fn attach(
        &self,
        token: &Token,
        caller: &Caller,
        read_only: bool,
    ) -> Result<ViewGrant, KvmError> {
        let (number, target) = self.use_token(token)?;
        self.state().open.insert(number, caller.clone());
        let rights = if read_only { Rights::ReadOnly } else { self.scope.rights };
        Ok(ViewGrant { view: number, grant: number, target, scope: self.scope.at_most(rights) })
    }

    fn current(&self, view: u64) -> Option<Arc<dyn TargetMemory>> {
        let state = self.state();
        let is_open = state.open.contains_key(&view) && !state.ends_at_once;
        state.target.clone().filter(|_| is_open).map(|target| -> Arc<dyn TargetMemory> { target })
    }

    fn detached(&self, view: u64, counters: ViewCounters) {
        let mut state = self.state();
        state.open.remove(&view);
        state.told.push((view, counters, true));
    }

    fn counters(&self, view: u64, counters: ViewCounters) {
        self.state().told.push((view, counters, false));
    }

    fn set_events(&self, handler: Weak<dyn TargetEvents>) {
        self.state().events = Some(handler);
    }
}
