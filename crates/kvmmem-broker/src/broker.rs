// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What all connections and sessions share, and what the broker does for them.
//!
//! No two of the locks here, of a peer and of a hook are ever held together, but for one pair: a target's list of
//! hooks, then one of them.

use std::error::Error;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use kvmmem_abi::errno::KvmError;
use kvmmem_kvmi::token::Token;

use crate::audit;
use crate::endpoint::Endpoint;
use crate::grants::{Grants, Redeemed};
use crate::hook::HookError;
use crate::peer::Credentials;
use crate::registry::{Registry, Vm};
use crate::scope::{Rights, Scope};
use crate::session;
use crate::wire::{Answer, Refusal};

/// The most hooks of all targets: each has a thread.
const MAX_HOOKS: usize = 128;

/// The most VMs in one answer to a list request; keeps it within a packet.
const PAGE: usize = 16;

/// The broker's state.
#[derive(Debug, Default)]
pub struct Broker {
    registry: Mutex<Registry>,
    grants: Mutex<Grants>,
    hooks: AtomicUsize,
}

/// Why a request was refused.
#[derive(Debug)]
pub struct Refused {
    /// Which kind of failure.
    pub refusal: Refusal,
    /// The failure in words.
    pub message: String,
}

impl Refused {
    /// Of an error and all that is behind it: a peer gets one text.
    pub(crate) fn from_error(refusal: Refusal, error: &dyn Error) -> Self {
        Self { refusal, message: in_words(error) }
    }

    pub(crate) fn new(refusal: Refusal, message: impl ToString) -> Self {
        Self { refusal, message: message.to_string() }
    }
}

impl Broker {
    /// The registered VMs.
    pub(crate) fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn grants(&self) -> MutexGuard<'_, Grants> {
        self.grants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a token for a target whose tool is at `endpoint`. Where that is in a registered introspector, the token
    /// is pushed there before it is returned, and is good there only.
    ///
    /// # Errors
    /// EAGAIN where too many are outstanding, EPERM where the tool is in the target itself, ENOMEM where the system
    /// has no random bytes, EOPNOTSUPP where the target is gone.
    pub fn mint(&self, now: Instant, target: &Vm, endpoint: &Endpoint) -> Result<Token, KvmError> {
        let minted = self.mint_for(now, target, endpoint);
        match &minted {
            Ok((_, holder)) => audit::minted(target, endpoint, *holder),
            Err(error) => audit::not_minted(target, endpoint, &format!("{error:?}")),
        }
        minted.map(|(token, _)| token)
    }

    fn mint_for(
        &self,
        now: Instant,
        target: &Vm,
        endpoint: &Endpoint,
    ) -> Result<(Token, Option<u64>), KvmError> {
        let holder = match endpoint {
            Endpoint::Vsock { cid, .. } => self.registry().introspector(*cid),
            Endpoint::Unix(_) => None,
        };
        if holder.as_ref().is_some_and(|holder| holder.id() == target.id()) {
            return Err(KvmError::Perm);
        }
        let token = random_token()?;
        {
            let mut grants = self.grants();
            // The end of a target is marked before its tokens are voided: none is made after that.
            if target.is_gone() {
                return Err(KvmError::OpNotSupp);
            }
            let holder = holder.as_ref().map(|holder| holder.id());
            grants.mint(now, token.clone(), target.id(), holder).map_err(|_| KvmError::Again)?;
        }
        let Some(holder) = holder else { return Ok((token, None)) };
        if holder.peer().grant(target, &token, 0, Scope::whole(Rights::ReadWrite)).is_err() {
            self.grants().release(&token);
            return Ok((token, None));
        }
        Ok((token, Some(holder.id())))
    }

    /// Trades a token for a target on behalf of a VM.
    ///
    /// # Errors
    /// Where the VM is no introspector, or the token is not good.
    pub fn redeem(&self, now: Instant, by: Option<&Vm>, token: &Token) -> Result<Answer, Refused> {
        let by = introspector(by)?;
        let unknown = || Refused::new(Refusal::Unknown, "token is unknown, used or expired");
        let redeemed = self.grants().redeem(now, token, by.id()).ok_or_else(unknown)?;
        let target = match redeemed {
            Redeemed::Held => return Ok(Answer::Pushed),
            Redeemed::Target(target) => target,
        };
        if target == by.id() {
            return Err(Refused::new(Refusal::Denied, "a VM cannot map its own memory"));
        }
        let vm = self.registry().get(target).ok_or_else(unknown)?;
        by.peer()
            .introduce(&vm)
            .map_err(|_| Refused::new(Refusal::Busy, "the target is gone, or the VMM does not read"))?;
        audit::used(target, by);
        Ok(Answer::Redeemed { grant: 0, target, scope: Scope::whole(Rights::ReadWrite) })
    }

    /// Takes note that a VM has used a token that was pushed to it.
    pub fn used(&self, now: Instant, by: Option<&Vm>, token: &Token) {
        let Some(by) = by else { return };
        let target = self.grants().used(now, token, by.id());
        if let Some(target) = target {
            audit::used(target, by);
        }
    }

    /// A page of the VMs whose number is above `after`.
    pub fn list(&self, after: u64) -> Answer {
        let registry = self.registry();
        let mut vms = registry.after(after);
        let page: Vec<Arc<Vm>> = vms.by_ref().take(PAGE).cloned().collect();
        let more = vms.next().is_some();
        drop(vms);
        drop(registry);
        Answer::Targets { targets: page.iter().map(|vm| vm.info()).collect(), more }
    }

    /// Connects a target to a tool, for as long as both last.
    ///
    /// # Errors
    /// Where there is no such target, it has the hook already, or there are too many.
    pub fn hook(
        self: &Arc<Self>,
        peer: Credentials,
        target: &str,
        endpoint: Endpoint,
    ) -> Result<Answer, Refused> {
        let vm = self.find(target)?;
        if vm.ram().is_none() {
            return Err(Refused::new(Refusal::Denied, format!("{target:?} is not introspectable")));
        }
        let counted = Counted::new(self)
            .ok_or_else(|| Refused::new(Refusal::Limit, format!("there are {MAX_HOOKS} hooks already")))?;
        let hook = vm.hooks().add(endpoint.clone()).map_err(refuse_hook)?;
        audit::hooked(&vm, &endpoint, true, peer);
        let started = std::thread::Builder::new().name("kvmi-session".into()).spawn({
            let vm = Arc::clone(&vm);
            move || hook.run(|hook, stream| session::serve(&counted.0, &vm, hook, stream))
        });
        if let Err(error) = started {
            // It was there a moment ago; a racing unhook is as good.
            let _ = vm.hooks().remove(&endpoint);
            return Err(Refused::new(Refusal::Limit, format!("cannot start a thread: {error}")));
        }
        Ok(Answer::Done)
    }

    /// Undoes a hook.
    ///
    /// # Errors
    /// Where there is no such target or hook.
    pub fn unhook(&self, peer: Credentials, target: &str, endpoint: &Endpoint) -> Result<Answer, Refused> {
        let vm = self.find(target)?;
        vm.hooks().remove(endpoint).map_err(refuse_hook)?;
        audit::hooked(&vm, endpoint, false, peer);
        Ok(Answer::Done)
    }

    /// Does what the end of a VM's connection demands: its tokens die, its sessions end, whoever knows it is told.
    pub fn retire(&self, vm: &Vm) {
        vm.mark_gone();
        let others: Vec<Arc<Vm>> = {
            let mut registry = self.registry();
            registry.remove(vm.id());
            registry.after(0).cloned().collect()
        };
        self.grants().forget(vm.id());
        vm.hooks().close();
        for other in others {
            other.peer().gone(vm.id());
        }
        audit::gone(vm);
    }

    /// How many hooks have a thread.
    pub fn hook_threads(&self) -> usize {
        self.hooks.load(Ordering::Acquire)
    }

    /// A VM by its name or its UUID.
    ///
    /// # Errors
    /// Where there is none.
    pub fn find(&self, target: &str) -> Result<Arc<Vm>, Refused> {
        let found = self.registry().find(target);
        found.ok_or_else(|| Refused::new(Refusal::Unknown, format!("no VM is named {target:?}")))
    }
}

/// A hook's share of [`MAX_HOOKS`], given back on drop.
struct Counted(Arc<Broker>);

impl Counted {
    fn new(broker: &Arc<Broker>) -> Option<Self> {
        let more = |count: usize| (count < MAX_HOOKS).then_some(count + 1);
        broker.hooks.fetch_update(Ordering::AcqRel, Ordering::Acquire, more).ok()?;
        Some(Self(Arc::clone(broker)))
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.hooks.fetch_sub(1, Ordering::AcqRel);
    }
}

fn introspector(vm: Option<&Vm>) -> Result<&Vm, Refused> {
    vm.filter(|vm| vm.registration().introspector)
        .ok_or_else(|| Refused::new(Refusal::Denied, "only the VMM of an introspector may redeem a token"))
}

fn refuse_hook(error: HookError) -> Refused {
    let refusal = match error {
        HookError::Exists(_) => Refusal::Exists,
        HookError::Unknown(_) | HookError::Gone => Refusal::Unknown,
        HookError::Full => Refusal::Limit,
    };
    Refused::new(refusal, error)
}

/// An error and what is behind it, in one line.
pub(crate) fn in_words(error: &dyn Error) -> String {
    let mut words = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        words.push_str(": ");
        words.push_str(&error.to_string());
        source = error.source();
    }
    words
}

/// 256 bits from the system's generator.
fn random_token() -> Result<Token, KvmError> {
    let mut bytes = zeroize::Zeroizing::new([0; Token::SIZE]);
    getrandom::fill(&mut *bytes).map_err(|_| KvmError::NoMem)?;
    Ok(Token::from_bytes(&bytes))
}
