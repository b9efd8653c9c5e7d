// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tokens that tools get over KVMI.

use std::sync::Arc;
use std::time::Instant;

use kvmmem_abi::errno::KvmError;
use kvmmem_kvmi::token::Token;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::scope::Rights;

use crate::audit::Event;
use crate::broker::Broker;
use crate::core::tokens::NewToken;
use crate::hook::Owner;
use crate::registry::Vm;
use crate::tables::Tables;

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
    pub(crate) fn mint(
        &self,
        now: Instant,
        target: &Vm,
        endpoint: &Endpoint,
        owner: Owner,
    ) -> Result<Token, KvmError> {
        let minted = self.mint_for(now, target.id(), owner);
        let (token, NewToken { grant, scope, .. }, holder) = minted.inspect_err(|error| {
            self.not_minted(target, endpoint, *error);
        })?;
        let (vm, scope, holder) = (target, &scope, holder.as_deref());
        self.audit().write(Event::NewToken { vm, endpoint, grant, scope, holder });
        Ok(token)
    }

    /// The same for a tool in VM `tool`, but an error is the caller's to write down; returns the
    /// grant as well.
    ///
    /// # Errors
    /// Those of [`Self::mint`], and EAGAIN where the target's policy allows other rights than
    /// `rights` by now.
    pub(crate) fn mint_granted(
        &self,
        target: &Vm,
        endpoint: &Endpoint,
        tool: u64,
        rights: Rights,
    ) -> Result<(Token, u64), KvmError> {
        let minted = self.mint_for(self.now(), target.id(), Owner::Vm(tool))?;
        let (token, NewToken { grant, scope, .. }, holder) = minted;
        if scope.rights != rights {
            self.withdraw(grant);
            return Err(KvmError::Again);
        }
        let (vm, scope, holder) = (target, &scope, holder.as_deref());
        self.audit().write(Event::NewToken { vm, endpoint, grant, scope, holder });
        Ok((token, grant))
    }

    /// Writes down that a token was not made.
    pub(crate) fn not_minted(&self, target: &Vm, endpoint: &Endpoint, error: KvmError) {
        let reason = &format!("{error:?}");
        self.audit().write(Event::NotMinted { vm: target, endpoint, reason });
    }

    /// Ends a grant whose token was not given out.
    pub(crate) fn withdraw(&self, grant: u64) {
        let now = self.now();
        self.decide(|tables| {
            if let Ok(revocation) = tables.core.revoke(now, grant) {
                tables.core.end_revocation(revocation.number);
            }
        });
    }

    #[allow(clippy::type_complexity, reason = "the token and the introspector that has it")]
    fn mint_for(
        &self,
        now: Instant,
        target: u64,
        owner: Owner,
    ) -> Result<(Token, NewToken, Option<Arc<Vm>>), KvmError> {
        let tool = match owner {
            Owner::Vm(vm) => Some(vm),
            Owner::Host(_) => None,
        };
        let token = random_token()?;
        let peer = {
            let tables = self.tables();
            let peer = tool.and_then(|tool| tables.core.holder_of(tool));
            peer.and_then(|peer| tables.peers.get(&peer).cloned())
        };
        let sending = peer.as_ref().map(|peer| peer.outbox().sending());
        let may_get_files = peer.as_ref().zip(sending.as_ref()).is_some_and(|(peer, sending)| {
            peer.flush_held(sending).is_ok() && peer.has_read().unwrap_or(false)
        });
        let mint = |tables: &mut Tables| {
            let minted = tables.core.mint(now, target, tool, &token, may_get_files)?;
            let holder = minted.holder.and_then(|vm| tables.vms.get(&vm).cloned());
            Ok((minted, holder))
        };
        let (minted, pending) = self.decide_only(mint);
        let sent = peer
            .as_ref()
            .zip(sending.as_ref())
            .map_or(Ok(()), |(peer, sending)| peer.flush_held(sending));
        drop(sending);
        self.perform(pending);
        let (minted, holder) = minted?;
        if let (Err(failed), Some(peer), Some(holder)) = (sent, &peer, &holder) {
            self.decide(|tables| {
                tables.core.grants.not_pushed(minted.grant, holder.identity().uuid);
                if let Some(target) = failed.target {
                    tables.core.not_introduced(peer.number(), target);
                }
            });
        }
        Ok((token, minted, holder))
    }

    /// Makes a token as a hook of a target gets it whose tool is in VM `tool`, or on the host.
    ///
    /// # Errors
    /// As [`Self::mint`].
    pub(crate) fn mint_token(&self, target: u64, tool: Option<u64>) -> Result<Token, KvmError> {
        let by = Credentials { pid: std::process::id(), uid: rustix::process::geteuid().as_raw() };
        let endpoint = Endpoint::Unix("tool".into());
        let target = self.vm(target).ok_or(KvmError::OpNotSupp)?;
        self.mint(self.now(), &target, &endpoint, tool.map_or(Owner::Host(by), Owner::Vm))
    }
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

#[cfg(test)]
mod tests {
    use kvmmem_proto::message::{
        Answer, Call, Cursor, GrantInfo, GrantState, KvmiPolicy, VmIdentity,
    };

    use super::*;
    use crate::core::limits::Limits;
    use crate::service::Service;
    use crate::test_peer::{Connection, identity};

    #[test]
    fn a_token_is_never_of_other_rights_than_the_view_that_lists_it() {
        let service = Arc::new(Service::new(Limits::default()));
        let [mut tiger, mut watcher, mut root] = [(); 3].map(|()| Connection::new(&service, 0));
        let Answer::Registered { vm: target, .. } = tiger.register_target("tiger").unwrap() else {
            panic!("no target")
        };
        let introspector = VmIdentity { introspector: true, ..identity("watcher") };
        let call = Call::Register(introspector.registered(vec![]));
        let Answer::Registered { vm: tool, .. } = watcher.ask(call, None).unwrap() else {
            panic!("no introspector")
        };
        let (broker, endpoint) = (service.broker(), Endpoint::Vsock { cid: 7, port: 9 });
        let vm = broker.vm(target).unwrap();
        let mint = |rights| broker.mint_granted(&vm, &endpoint, tool, rights).map(|(_, it)| it);
        mint(Rights::ReadWrite).unwrap();
        // While the view is plugged in that lists it.
        let policy = Call::Policy { target: "tiger".into(), set: Some(KvmiPolicy::ReadOnly) };
        root.ask(policy, None).unwrap();
        assert_eq!(mint(Rights::ReadWrite), Err(KvmError::Again));
        let grants = root.ask(Call::Grants { after: Cursor::default() }, None).unwrap();
        let Answer::Grants { grants, .. } = grants else { panic!("no grants") };
        let is_good = |grant: &&GrantInfo| grant.state == GrantState::Active;
        assert!(grants.iter().filter(is_good).all(|grant| grant.scope.rights == Rights::ReadWrite));
        assert!(mint(Rights::ReadOnly).is_ok());
    }
}
