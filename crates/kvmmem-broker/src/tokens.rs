// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tokens: made for tools and for operators, used for pages.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem_abi::errno::KvmError;
use kvmmem_kvmi::token::Token;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::map::SHARE_IT;
use kvmmem_proto::message::{Answer, Cursor, GrantInfo, GrantRequest, KvmiPolicy, Origin, Refusal};
use kvmmem_proto::name::is_unprintable;
use kvmmem_proto::scope::{Scope, ScopeError};
use uuid::Uuid;

use crate::broker::{Broker, Refused};
use crate::core::grants::{Holder, KVMI_LIFETIME, Listed, Opened, Redeemed, Terms, UseError, User};
use crate::hook::Owner;
use crate::peer::Peer;
use crate::ram::Ram;
use crate::registry::Vm;

/// The longest time for which a token may be used.
const MAX_TTL: Duration = Duration::from_secs(30 * 24 * 60 * 60);

/// The longest label, bytes.
const MAX_LABEL: usize = 64;

/// A token, the number and the scope of its grant, and the introspector that it was pushed to.
type Minted = (Token, u64, Scope, Option<Arc<Vm>>);

/// What is wrong with an operator's request.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error("{0:?} is not introspectable; start its VM with --introspectable")]
    NotIntrospectable(String),
    #[error("a token's time is {0} ms, expected 1 ms to 30 days")]
    Ttl(u64),
    #[error("a token must be good for at least one use")]
    Uses,
    #[error("a label has at most {MAX_LABEL} bytes and no control characters")]
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

impl Broker {
    /// Makes a token for a target whose tool is `owner`'s and at `endpoint`. Where the owner is a
    /// registered introspector, the token is pushed there before it is returned, and is good
    /// there only.
    ///
    /// # Errors
    /// EAGAIN where too many are outstanding, EPERM where the tool is in the target itself or its
    /// VM is gone, or the target's policy allows none, ENOMEM where the system has no random
    /// bytes, EOPNOTSUPP where the target is gone, or its RAM is private and the tool in an
    /// introspector.
    pub fn mint(
        &self,
        now: Instant,
        target: &Vm,
        endpoint: &Endpoint,
        owner: Owner,
    ) -> Result<Token, KvmError> {
        let minted = self.mint_for(now, target, owner);
        let (token, grant, scope, holder) = minted.inspect_err(|error| {
            self.audit().not_minted(target, endpoint, &format!("{error:?}"))
        })?;
        self.audit().minted(target, endpoint, grant, &scope, holder.as_deref());
        Ok(token)
    }

    fn mint_for(&self, now: Instant, target: &Vm, owner: Owner) -> Result<Minted, KvmError> {
        let scope =
            self.core().policies.of(target.registration().uuid).scope().ok_or(KvmError::Perm)?;
        let tool = match owner {
            // Not by the context id, which may be another VM's by now.
            Owner::Vm(vm) => Some(self.registry().get(vm).ok_or(KvmError::Perm)?),
            Owner::Host(_) => None,
        };
        let holder = tool.filter(|vm| vm.registration().introspector);
        if holder.as_ref().is_some_and(|holder| holder.id() == target.id()) {
            return Err(KvmError::Perm);
        }
        if holder.is_some() && target.ram().is_some_and(Ram::is_private) {
            return Err(KvmError::OpNotSupp);
        }
        let token = random_token()?;
        let terms = Terms {
            target: target.id(),
            scope: scope.clone(),
            lifetime: KVMI_LIFETIME,
            uses: 1,
            holder: holder
                .as_ref()
                .map_or(Holder::Anybody, |holder| Holder::Pushed(holder.peer().number())),
            label: None,
            origin: Origin::Kvmi,
            by: target.peer().credentials(),
        };
        let grant = {
            let mut core = self.core();
            // The end of a target is marked before its tokens are voided: none is made after that.
            if target.is_gone() {
                return Err(KvmError::OpNotSupp);
            }
            core.grants.mint(now, token.clone(), terms).map_err(|_| KvmError::Again)?
        };
        let opens = Opened { grant, target: target.id(), scope: scope.clone() };
        // A VMM that does not read for a moment can still ask for the token; another one cannot.
        if let Some(holder) = &holder
            && holder.peer().grant(target, &token, opens).is_err()
        {
            self.core().grants.not_pushed(grant, holder.registration().uuid);
        }
        Ok((token, grant, scope, holder))
    }

    /// Makes a token as an operator asks for it.
    ///
    /// # Errors
    /// Where there is no such target, the request breaks a rule, or there are too many grants.
    pub fn grant(
        &self,
        now: Instant,
        peer: Credentials,
        request: &GrantRequest,
    ) -> Result<Answer, Refused> {
        let vm = self.find(&request.target)?;
        let terms = terms(&vm, request, peer)
            .map_err(|error| Refused::from_error(Refusal::Invalid, &error))?;
        let scope = terms.scope.clone();
        let token = random_token().map_err(|_| {
            Refused::new(Refusal::Limit, "the system has no random bytes for a token")
        })?;
        let grant = {
            let mut core = self.core();
            if vm.is_gone() {
                return Err(Refused::new(Refusal::Unknown, "the target is gone"));
            }
            let minted = core.grants.mint(now, token.clone(), terms);
            minted.map_err(|error| Refused::from_error(Refusal::Limit, &error))?
        };
        self.audit().granted(&vm, grant, request, &scope, peer);
        Ok(Answer::Granted { grant, token })
    }

    /// A page of the grants behind `after`.
    pub fn list_grants(&self, now: Instant, after: Cursor) -> Answer {
        let (page, next) = self.core().grants.list(now, after);
        let registry = self.registry();
        let named = |listed: Listed| {
            // One whose target has gone this moment is about to go.
            let target = registry.get(listed.target)?;
            let holder = match listed.holder {
                Holder::Anybody => None,
                Holder::Vm(uuid) => Some(uuid),
                Holder::Pushed(peer) => registry.of_peer(peer).map(|vm| vm.registration().uuid),
            };
            Some(GrantInfo {
                id: listed.id,
                target: target.registration().name.clone(),
                target_uuid: target.registration().uuid,
                scope: listed.scope,
                uses_left: listed.uses_left,
                expires_in_ms: listed.expires_in_ms,
                holder,
                label: listed.label,
                origin: listed.origin,
                state: listed.state,
                views: listed.views,
            })
        };
        Answer::Grants { grants: page.into_iter().filter_map(named).collect(), next }
    }

    /// Trades a token for a target on behalf of a VM.
    ///
    /// # Errors
    /// Where the VM is no introspector, or the token is not good.
    pub fn redeem(&self, now: Instant, by: Option<&Vm>, token: &Token) -> Result<Answer, Refused> {
        let by = introspector(by)?;
        let user = user(by.peer(), Some(by));
        self.refuse_private(now, token, user)?;
        let redeemed = self.core().grants.redeem(now, token, user).map_err(refuse_use)?;
        let opened = match redeemed {
            Redeemed::Held => return Ok(Answer::Pushed),
            Redeemed::Opened(opened) => opened,
        };
        let vm = self.registry().get(opened.target).ok_or_else(|| refuse_use(UseError::Unknown))?;
        by.peer().introduce(&vm).map_err(|_| busy())?;
        self.audit().used(opened.grant, &vm, by);
        Ok(Answer::Redeemed { grant: opened.grant, target: opened.target, scope: opened.scope })
    }

    /// Takes note that a VM has used a token that was pushed to it.
    ///
    /// # Errors
    /// Where the token was not.
    pub fn used(&self, now: Instant, by: Option<&Vm>, token: &Token) -> Result<(), Refused> {
        let by = introspector(by)?;
        let used = self.core().grants.used(now, token, by.peer().number());
        let opened = used.ok_or_else(|| refuse_use(UseError::Unknown))?;
        let target = self.registry().get(opened.target);
        if let Some(target) = target {
            self.audit().used(opened.grant, &target, by);
        }
        Ok(())
    }

    /// What tokens allow that KVMI makes for a target; sets it first if asked to.
    ///
    /// # Errors
    /// Where there is no such target, or there are too many policies.
    pub fn policy(
        &self,
        peer: Credentials,
        target: &str,
        set: Option<KvmiPolicy>,
    ) -> Result<Answer, Refused> {
        let uuid = match self.find(target) {
            Ok(vm) => vm.registration().uuid,
            Err(refused) => Uuid::parse_str(target).map_err(|_| {
                let message = format!(
                    "{}; a VM that is not registered is named by its UUID",
                    refused.message
                );
                Refused::new(Refusal::Unknown, message)
            })?,
        };
        if let Some(policy) = set {
            let done = self.core().policies.set(uuid, policy, peer);
            done.map_err(|error| Refused::from_error(Refusal::Limit, &error))?;
            self.audit().policy(uuid, policy, peer);
        }
        Ok(Answer::Policy { policy: self.core().policies.of(uuid) })
    }
}

/// Checks an operator's request.
fn terms(vm: &Vm, request: &GrantRequest, by: Credentials) -> Result<Terms, RequestError> {
    let registration = vm.registration();
    let ram = vm.ram().ok_or_else(|| RequestError::NotIntrospectable(registration.name.clone()))?;
    let lifetime = Duration::from_millis(request.ttl_ms);
    if lifetime.is_zero() || lifetime > MAX_TTL {
        return Err(RequestError::Ttl(request.ttl_ms));
    }
    if request.uses == 0 {
        return Err(RequestError::Uses);
    }
    if request
        .label
        .as_ref()
        .is_some_and(|label| label.len() > MAX_LABEL || label.chars().any(is_unprintable))
    {
        return Err(RequestError::Label);
    }
    if request.holder == Some(registration.uuid) {
        return Err(RequestError::Holder);
    }
    if request.holder.is_some() && ram.is_private() {
        return Err(RequestError::Private(registration.name.clone()));
    }
    let scope = Scope { rights: request.rights, spans: request.spans.clone() };
    scope.check(&ram.layout().map).map_err(RequestError::Scope)?;
    Ok(Terms {
        target: vm.id(),
        scope,
        lifetime,
        uses: request.uses,
        holder: request.holder.map_or(Holder::Anybody, Holder::Vm),
        label: request.label.clone(),
        origin: Origin::Operator,
        by,
    })
}

/// Who brings a token.
pub(crate) fn user(peer: &Peer, vm: Option<&Vm>) -> User {
    User { peer: peer.number(), vm: vm.map(Vm::id), uuid: vm.map(|vm| vm.registration().uuid) }
}

/// The VM of a connection that may use tokens for it.
pub(crate) fn introspector(vm: Option<&Vm>) -> Result<&Vm, Refused> {
    vm.filter(|vm| vm.registration().introspector).ok_or_else(|| {
        Refused::new(Refusal::Denied, "only the VMM of an introspector may redeem a token")
    })
}

pub(crate) fn refuse_use(error: UseError) -> Refused {
    let refusal = match error {
        UseError::Unknown => Refusal::Unknown,
        UseError::Own => Refusal::Denied,
        UseError::TooManyViews => Refusal::Limit,
    };
    Refused::new(refusal, error)
}

pub(crate) fn busy() -> Refused {
    Refused::new(Refusal::Busy, "the target is gone, or the VMM does not read")
}

/// A new token: 256 bits from the system's generator.
///
/// # Errors
/// ENOMEM where the system has no random bytes.
pub(crate) fn random_token() -> Result<Token, KvmError> {
    let mut bytes = zeroize::Zeroizing::new([0; Token::SIZE]);
    getrandom::fill(&mut *bytes).map_err(|_| KvmError::NoMem)?;
    Ok(Token::from_bytes(&bytes))
}
