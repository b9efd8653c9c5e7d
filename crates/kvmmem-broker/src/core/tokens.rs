// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tokens: made for tools and for operators, used for pages.

use std::time::{Duration, Instant};

use kvmmem_abi::errno::KvmError;
use kvmmem_kvmi::token::Token;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::map::SHARE_IT;
use kvmmem_proto::message::{Answer, Cursor, GrantRequest, KvmiPolicy, Origin, Refusal};
use kvmmem_proto::scope::{Scope, ScopeError};
use uuid::Uuid;

use super::call_error::CallError;
use super::effect::{Effect, Push};
use super::grants::{Access, Grants, Holder, Names, Terms, UseError};
use super::introduction::{NotSent, private};
use super::machine::Core;
use super::vms::Vm;

/// What is wrong with an operator's request.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("{0:?} is not introspectable; start its VM with --introspectable")]
    NotIntrospectable(String),
    #[error("a token's time is {0} ms, expected 1 ms to 30 days")]
    Ttl(u64),
    #[error("a token must be good for at least one use")]
    Uses,
    #[error("a label has at most {} bytes and no control characters", GrantRequest::MAX_LABEL)]
    Label,
    #[error("the holder is the target itself; a VM cannot map its own memory")]
    Holder,
    #[error(
        "the RAM of {0:?} is private to its VMM, so no VM can map it; {SHARE_IT}; or grant it without a holder, to a process of this host"
    )]
    Private(String),
    #[error("the grant's scope is refused")]
    Scope(#[source] ScopeError),
}

/// A token that was made for a tool.
#[derive(Debug)]
pub(crate) struct NewToken {
    pub(crate) grant: u64,
    pub(crate) scope: Scope,
    /// The introspector that it is for.
    pub(crate) holder: Option<u64>,
}

impl Core {
    /// The connection of the registered introspector that a tool in this VM is in.
    pub(crate) fn holder_of(&self, tool: u64) -> Option<u64> {
        self.vms.get(tool).filter(|vm| vm.identity.introspector).map(|vm| vm.peer)
    }

    /// What a token may allow that is made for a target whose tool is in VM `tool`, or on the host.
    ///
    /// # Errors
    /// EPERM where the tool is in the target itself or its VM is gone, or the target's policy
    /// allows none, EOPNOTSUPP where the target is gone, or its RAM is private and the tool in an
    /// introspector.
    pub(crate) fn may_mint(&self, target: u64, tool: Option<u64>) -> Result<Scope, KvmError> {
        let vm = self.vms.get(target).ok_or(KvmError::OpNotSupp)?;
        let scope = self.policies.of(vm.identity.uuid).scope().ok_or(KvmError::Perm)?;
        // Not by the context id, which may be another VM's by now.
        let tool = tool.map(|tool| self.vms.get(tool).ok_or(KvmError::Perm)).transpose()?;
        let Some(holder) = tool.filter(|vm| vm.identity.introspector) else {
            return Ok(scope);
        };
        if holder.id == target {
            return Err(KvmError::Perm);
        }
        if vm.layout.as_ref().is_some_and(|layout| layout.is_private) {
            return Err(KvmError::OpNotSupp);
        }
        Ok(scope)
    }

    /// Makes a token for a target whose tool is in VM `tool`, or on the host. Where that VM is a
    /// registered introspector, the token is pushed there and is good there only.
    ///
    /// # Errors
    /// EAGAIN where too many are outstanding, and those of [`Self::may_mint`].
    pub(crate) fn mint(
        &mut self,
        now: Instant,
        target: u64,
        tool: Option<u64>,
        token: &Token,
        may_get_files: bool,
    ) -> Result<NewToken, KvmError> {
        let scope = self.may_mint(target, tool)?;
        let by = self.vms.get(target).ok_or(KvmError::OpNotSupp)?.vmm;
        let holder = tool.and_then(|tool| self.vms.get(tool));
        let holder = holder.filter(|vm| vm.identity.introspector);
        let holder = holder.map(|vm| (vm.id, vm.peer, vm.identity.uuid));
        let lifetime = self.kvmi_lifetime;
        let terms = |holder| Terms {
            target,
            scope: scope.clone(),
            lifetime,
            uses: 1,
            holder,
            label: None,
            origin: Origin::Kvmi,
            by,
        };
        let mint = |grants: &mut Grants, holder| {
            grants.mint(now, token.clone(), terms(holder)).map_err(|_| KvmError::Again)
        };
        let Some((holder, peer, uuid)) = holder else {
            let grant = mint(&mut self.grants, Holder::Anybody)?;
            return Ok(NewToken { grant, scope, holder: None });
        };
        let pushed = self.introducing(peer, target, may_get_files, |grants| {
            Ok(mint(grants, Holder::Pushed(peer)))
        });
        let grant = match pushed {
            Ok(grant) => {
                let grant = grant?;
                let opened = Access { grant, target, scope: scope.clone() };
                let push = Push::Granted { token: token.clone(), opened, lifetime };
                self.effects.push(Effect::Push { peer, push });
                grant
            }
            // A VMM that does not read for a moment can still ask for the token; another one
            // cannot.
            Err(_) => mint(&mut self.grants, Holder::Vm(uuid))?,
        };
        Ok(NewToken { grant, scope, holder: Some(holder) })
    }

    /// Makes a token as an operator asks for it.
    pub(crate) fn grant(
        &mut self,
        now: Instant,
        by: Credentials,
        request: &GrantRequest,
        token: &Token,
    ) -> Result<Access, CallError> {
        let vm = self.vms.target(&request.target)?;
        let terms = terms(vm, request, by)
            .map_err(|error| CallError::from_error(Refusal::Invalid, &error))?;
        let (target, scope) = (vm.id, terms.scope.clone());
        let grant = self.grants.mint(now, token.clone(), terms);
        let grant = grant.map_err(|error| CallError::from_error(Refusal::Limit, &error))?;
        Ok(Access { grant, target, scope })
    }

    /// A page of the grants behind `after`.
    pub(crate) fn list_grants(&mut self, now: Instant, after: Cursor) -> Answer {
        let (vms, peers) = (&self.vms, &self.peers);
        let uuid = |vm| vms.get(vm).map(|vm| vm.identity.uuid);
        let names = |target, holder| {
            let target = &vms.get(target)?.identity;
            let holder = match holder {
                Holder::Anybody => None,
                Holder::Vm(uuid) => Some(uuid),
                Holder::Pushed(peer) => peers.get(&peer).and_then(|peer| uuid(peer.vm?)),
            };
            Some(Names { target: target.name.clone(), target_uuid: target.uuid, holder })
        };
        let (grants, next) = self.grants.list(now, after, names);
        Answer::Grants { grants, next }
    }

    /// Trades a token for a target on behalf of an introspector; `None` where the token was pushed
    /// to it, and is still there to be claimed.
    ///
    /// # Errors
    /// Where the peer's VM is no introspector, the token is not good, or the peer has to read first
    /// what was sent to it.
    pub(crate) fn redeem(
        &mut self,
        now: Instant,
        who: u64,
        token: &Token,
        may_get_files: bool,
    ) -> Result<Option<Access>, NotSent> {
        let by = self.user(who)?;
        let target = self.grants.would_open(now, token, by).map_err(CallError::from)?.target;
        let vm = self.vms.get(target).ok_or_else(|| CallError::from(UseError::Unknown))?;
        if vm.layout.as_ref().is_some_and(|layout| layout.is_private) {
            return Err(private(&vm.identity).into());
        }
        self.introducing(who, target, may_get_files, |grants| {
            grants.redeem(now, token, by).map_err(CallError::from)
        })
    }

    /// Records that a VM has used the token of a grant that was pushed to it.
    ///
    /// # Errors
    /// Where the peer's VM is no introspector, or the token was not.
    pub(crate) fn used(&mut self, now: Instant, who: u64, grant: u64) -> Result<Access, CallError> {
        self.user(who)?;
        self.grants.used(now, grant, who).ok_or_else(|| CallError::from(UseError::Unknown))
    }

    /// What tokens allow that KVMI makes for a target; sets it first if asked to. Returns the
    /// target's UUID as well.
    pub(crate) fn policy(
        &mut self,
        by: Credentials,
        target: &str,
        set: Option<KvmiPolicy>,
    ) -> Result<(Uuid, KvmiPolicy), CallError> {
        let uuid = match self.vms.target(target) {
            Ok(vm) => vm.identity.uuid,
            Err(refused) => {
                let uuid = Uuid::parse_str(target).ok().filter(|uuid| !uuid.is_nil());
                uuid.ok_or_else(|| {
                    let message = format!(
                        "{}; a VM that is not registered is named by its UUID",
                        refused.message
                    );
                    CallError::new(Refusal::Unknown, message)
                })?
            }
        };
        if let Some(policy) = set {
            let done = self.policies.set(uuid, policy, by);
            done.map_err(|error| CallError::from_error(Refusal::Limit, &error))?;
        }
        Ok((uuid, self.policies.of(uuid)))
    }
}

/// Checks an operator's request.
fn terms(vm: &Vm, request: &GrantRequest, by: Credentials) -> Result<Terms, RequestError> {
    let identity = &vm.identity;
    let layout =
        vm.layout.as_ref().ok_or_else(|| RequestError::NotIntrospectable(identity.name.clone()))?;
    let lifetime = Duration::from_millis(request.ttl_ms);
    if lifetime.is_zero() || lifetime > GrantRequest::MAX_TTL {
        return Err(RequestError::Ttl(request.ttl_ms));
    }
    if request.uses == 0 {
        return Err(RequestError::Uses);
    }
    if request.label.as_deref().is_some_and(|label| !GrantRequest::is_label(label)) {
        return Err(RequestError::Label);
    }
    if request.holder == Some(identity.uuid) {
        return Err(RequestError::Holder);
    }
    if request.holder.is_some() && layout.is_private {
        return Err(RequestError::Private(identity.name.clone()));
    }
    let scope = Scope { rights: request.rights, spans: request.spans.clone() };
    scope.check(&layout.map).map_err(RequestError::Scope)?;
    Ok(Terms {
        target: vm.id,
        scope,
        lifetime,
        uses: request.uses,
        holder: request.holder.map_or(Holder::Anybody, Holder::Vm),
        label: request.label.clone(),
        origin: Origin::Operator,
        by,
    })
}
