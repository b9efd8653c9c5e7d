// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The views that are plugged into an introspector for the tokens that its tools get over KVMI: at
//! most one for a target and rights.
//!
//! The first token that a tool asks for has the view plugged in, and waits for that a moment; the
//! view lasts until the last hook of the target to this introspector is undone, or something else
//! ends it. Where it cannot be plugged in, tokens are made all the same and open views only.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use kvmmem_abi::descriptor::FLAG_TOKENS;
use kvmmem_abi::errno::KvmError;
use kvmmem_kvmi::token::Token;
use kvmmem_limit::RateLimit;
use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::guest::MappedBy;
use kvmmem_proto::message::Caller;
use kvmmem_proto::scope::Rights;

use super::handle::Introspector;
use super::link::Link;
use super::open::OpenError;
use super::token_list::{Entry, List, State};
use super::token_view::TokenView;
use crate::broker::Broker;
use crate::core::call_error::in_words;
use crate::registry::Vm;
use crate::sync::lock;
use crate::workers::Party;

/// How long one tool of an introspector waits for the view before it is asked to come again.
const WAIT: Duration = Duration::from_secs(1);

/// How long no view is plugged in after that has failed, at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(300);

/// A guest can cause these at will.
static WARNINGS: RateLimit = RateLimit::new(5);

impl Introspector {
    /// Makes a token for a tool of this VM, and lists it in a view's descriptor page: the guest's
    /// driver serves MAP from that view.
    ///
    /// # Errors
    /// Those of [`Broker::mint`], and EAGAIN while the view is being plugged in.
    pub(crate) fn mint(
        self: &Arc<Self>,
        target: &Vm,
        endpoint: &Endpoint,
    ) -> Result<Token, KvmError> {
        let broker = self.broker.upgrade().ok_or(KvmError::OpNotSupp)?;
        let tool = self.traits.vm;
        let scope = broker.tables().core.may_mint(target.id(), Some(tool));
        let minted = scope.and_then(|scope| {
            let view = self.token_view(target.id(), scope.rights, endpoint)?;
            // The target's policy may just have changed.
            let (token, grant) = broker.mint_granted(target, endpoint, tool, scope.rights)?;
            if let Some(view) = view {
                list_granted(&broker, &self.link, &view, &token, grant)?;
            }
            Ok(token)
        });
        minted.inspect_err(|error| broker.not_minted(target, endpoint, *error))
    }

    /// The view in whose page a token is to be listed that allows this for a target; `None` where
    /// it cannot be plugged in.
    ///
    /// # Errors
    /// EAGAIN while it is being plugged in.
    fn token_view(
        self: &Arc<Self>,
        target: u64,
        rights: Rights,
        endpoint: &Endpoint,
    ) -> Result<Option<Arc<TokenView>>, KvmError> {
        let views = &self.token_views;
        let mut list = lock(&views.list);
        let pause = match list.ready(target, rights) {
            Ok(ready) => {
                drop(list);
                if let Some(view) = &ready {
                    view.tend(&self.link, Instant::now());
                }
                return Ok(ready);
            }
            Err(pause) => pause,
        };
        if !list.is_opening(target, rights) {
            list.set(target, rights, State::Opening { pause });
            self.start_opening(target, rights, endpoint);
        }
        if std::mem::replace(&mut list.is_waiting, true) {
            return Err(KvmError::Again);
        }
        let is_opening = |list: &mut List| list.is_opening(target, rights);
        let waited = views.changed.wait_timeout_while(list, WAIT, is_opening);
        let (mut list, _) = waited.unwrap_or_else(PoisonError::into_inner);
        list.is_waiting = false;
        list.ready(target, rights).map_err(|_| KvmError::Again)
    }

    fn start_opening(self: &Arc<Self>, target: u64, rights: Rights, endpoint: &Endpoint) {
        let (it, endpoint) = (Arc::clone(self), endpoint.clone());
        let job = move || it.open_token_view(target, rights, &endpoint);
        self.workers.run(Party::Cid(self.cid()), job);
    }

    fn open_token_view(self: &Arc<Self>, target: u64, rights: Rights, endpoint: &Endpoint) {
        let Some(broker) = self.broker.upgrade() else { return };
        let opened = self.plug_token_view(&broker, target, rights, endpoint);
        let views = &self.token_views;
        let mut list = lock(&views.list);
        let Some(State::Opening { pause }) = list.find(target, rights) else { return };
        let pause = *pause;
        let state = match opened {
            Ok(view) => State::Open(Arc::new(view)),
            Err(error) => {
                self.warn(target, &error);
                let next = (pause * 2).min(LONGEST_PAUSE);
                State::Failed { until: Instant::now() + pause, pause: next }
            }
        };
        list.set(target, rights, state);
        views.changed.notify_all();
        drop(list);
        // A hook that was undone meanwhile has found no view to end.
        if let Some(vm) = broker.vm(target) {
            self.unhooked(&vm, vm.peer().credentials());
        }
    }

    fn plug_token_view(
        self: &Arc<Self>,
        broker: &Broker,
        target: u64,
        rights: Rights,
        endpoint: &Endpoint,
    ) -> Result<TokenView, OpenError> {
        let vm = broker.vm(target).ok_or(OpenError::Ended)?;
        let minted = broker.mint_granted(&vm, endpoint, self.traits.vm, rights);
        let (token, _) = minted.map_err(OpenError::Mint)?;
        let caller = Caller { pid: 0, uid: 0, comm: "kvmi".to_owned() };
        let (view, _) = self.plug(&token, &caller, false, (MappedBy::Module, FLAG_TOKENS))?;
        TokenView::new(view, Arc::clone(&self.inbox)).ok_or(OpenError::Ended)
    }

    fn warn(&self, target: u64, error: &OpenError) {
        if let Some(suppressed) = WARNINGS.allow(Instant::now()) {
            tracing::warn!(
                suppressed,
                introspector = self.name(),
                target,
                error = in_words(error),
                "cannot plug in the view for KVMI's tokens: its tools cannot MAP"
            );
        }
    }

    /// Ends the views for a target's tokens once no hook of the target leads here; returns when
    /// they are unplugged, or the guest was waited for long enough.
    pub(crate) fn unhooked(&self, target: &Vm, by: Credentials) {
        let mut list = lock(&self.token_views.list);
        if target.hooks().has_owner(self.traits.vm) {
            return;
        }
        let is_of_target = |entry: &Entry| entry.target == target.id();
        let has_failed = |entry: &Entry| matches!(entry.state, State::Failed { .. });
        list.entries.retain(|entry| !is_of_target(entry) || !has_failed(entry));
        let views = list.open();
        drop(list);
        let Some(broker) = self.broker.upgrade() else { return };
        for view in views.iter().filter(|view| view.view.target == target.id()) {
            broker.revoke(view.view.grant, by);
        }
    }

    /// Withdraws the tokens that were used, have expired or are of a view that has ended; returns
    /// when to look again.
    pub(super) fn tend_tokens(&self, now: Instant) -> Option<Instant> {
        let open = lock(&self.token_views.list).open();
        let next = open.iter().filter_map(|view| view.tend(&self.link, now)).min();
        lock(&self.token_views.list).entries.retain(|entry| match &entry.state {
            State::Open(view) => !view.is_settled(),
            State::Failed { until, pause } => now < *until + *pause,
            State::Opening { .. } => true,
        });
        next
    }

    /// Withdraws a token that is about to be used for a view of its own.
    pub(super) fn withdraw_token(&self, token: &Token) {
        let open = lock(&self.token_views.list).open();
        open.iter().for_each(|view| view.withdraw(&self.link, token));
    }

    /// A revoked grant's target, if a token of the grant has mapped pages.
    pub(super) fn mapped_by(&self, grant: u64) -> Option<u64> {
        let open = lock(&self.token_views.list).open();
        let used = open.iter().find(|view| view.revoke(&self.link, grant));
        used.map(|view| view.view.target).or_else(|| self.link.mapped(grant))
    }
}

/// Lists a token that is about to be given out, unless its grant was revoked meanwhile: the
/// introspector's thread withdraws what is listed when it handles a revocation.
///
/// # Errors
/// Those of [`TokenView::list`], and EAGAIN where the grant was revoked.
fn list_granted(
    broker: &Broker,
    link: &Link,
    view: &TokenView,
    token: &Token,
    grant: u64,
) -> Result<(), KvmError> {
    let lifetime = broker.limits().kvmi_lifetime;
    view.list(token, grant, lifetime).inspect_err(|_| broker.withdraw(grant))?;
    // A revocation from here on finds it listed.
    if broker.tables().core.grants.is_active(broker.now(), grant) {
        return Ok(());
    }
    view.revoke(link, grant);
    Err(KvmError::Again)
}

#[cfg(test)]
mod tests {
    use kvmmem_abi::descriptor::Descriptor;
    use kvmmem_abi::token_list::{DIGEST_SIZE, digest_at, mark, used_at};
    use kvmmem_proto::message::{Answer, Call, NewGrant, VmIdentity};
    use kvmmem_proto::scope::Scope;
    use kvmmem_qemu::monitor::Counts;
    use kvmmem_qemu::windows::descriptor::Pages;

    use super::super::inbox::Inbox;
    use super::super::view::{AttachAnswer, View};
    use super::*;
    use crate::core::limits::Limits;
    use crate::service::Service;
    use crate::test_peer::{Connection, grant_request, identity};

    /// A view that lists tokens, and its page.
    fn token_view() -> (TokenView, Arc<std::os::fd::OwnedFd>) {
        let scope = Scope::whole(Rights::ReadOnly);
        let view =
            View::new(&AttachAnswer { view: 1, grant: 1, target: 1, scope }, Counts::default());
        let pages = Pages::new(Descriptor::default(), Vec::new(), 1).unwrap();
        let page = Arc::clone(&pages.files()[0]);
        *lock(&view.pages) = Some(pages);
        let inbox = Arc::new(Inbox::new().unwrap());
        (TokenView::new(Arc::new(view), inbox).unwrap(), page)
    }

    /// A broker with target `tiger`, and an introspector.
    struct Fixture {
        service: Arc<Service>,
        _tiger: Connection,
        link: Link,
    }

    impl Fixture {
        fn new() -> Self {
            let service = Arc::new(Service::new(Limits::default()));
            let mut tiger = Connection::new(&service, 0);
            tiger.register_target("tiger").unwrap();
            let lion = VmIdentity { cid: Some(7), introspector: true, ..identity("lion") };
            let by = Credentials { pid: std::process::id(), uid: 0 };
            let inbox = Arc::new(Inbox::new().unwrap());
            let link = Link::register(service.broker(), lion, by, &inbox).unwrap();
            Self { service, _tiger: tiger, link }
        }
    }

    #[test]
    fn a_token_that_is_revoked_before_it_is_listed_is_not_listed() {
        let Fixture { service, link, .. } = &Fixture::new();
        let mut root = Connection::new(service, 0);
        let mut grant = || {
            let granted = root.ask(Call::Grant(grant_request("tiger")), None).unwrap();
            let Answer::Granted(NewGrant { grant, token }) = granted else { panic!("no grant") };
            (token, grant)
        };
        let (broker, (view, page)) = (service.broker(), token_view());
        let is_listed = || {
            let mut digest = [0; DIGEST_SIZE];
            rustix::io::pread(&page, &mut digest, digest_at(0) as u64).unwrap();
            digest != [0; DIGEST_SIZE]
        };
        let (token, good) = grant();
        assert_eq!(list_granted(broker, link, &view, &token, good), Ok(()));
        assert!(is_listed());
        broker.withdraw(good);
        // As the introspector's thread does.
        assert!(!view.revoke(link, good));
        assert!(!is_listed());

        let (token, revoked) = grant();
        broker.withdraw(revoked);
        assert!(!view.revoke(link, revoked));
        assert_eq!(list_granted(broker, link, &view, &token, revoked), Err(KvmError::Again));
        assert!(!is_listed());
    }

    #[test]
    fn a_use_that_is_found_after_the_revocation_is_reported_until_that_is_confirmed() {
        let Fixture { service, link, .. } = &Fixture::new();
        let directory = tempfile::tempdir().unwrap();
        let log = directory.path().join("audit.log");
        let (broker, (view, page)) = (service.broker(), token_view());
        broker.write_audit_to(&log).unwrap();
        let tiger = broker.find("tiger").unwrap();
        for finds in [
            |view: &TokenView, link: &Link, _: u64| {
                view.tend(link, Instant::now());
            },
            |view: &TokenView, link: &Link, grant: u64| assert!(view.revoke(link, grant)),
        ] {
            let (endpoint, tool) = (Endpoint::Unix("tool".into()), link.vm().id());
            let minted = broker.mint_granted(&tiger, &endpoint, tool, Rights::ReadWrite);
            let (token, grant) = minted.unwrap();
            list_granted(broker, link, &view, &token, grant).unwrap();
            // As the guest's driver does.
            let mut digest = [0; DIGEST_SIZE];
            rustix::io::pread(&page, &mut digest, digest_at(0) as u64).unwrap();
            rustix::io::pwrite(&page, &mark(&digest).to_le_bytes(), used_at(0) as u64).unwrap();
            broker.withdraw(grant);
            finds(&view, link, grant);
            assert_eq!(link.mapped(grant), Some(tiger.id()));
            link.revoked(grant);
            link.used(grant);
            assert_eq!(link.mapped(grant), None);
        }
        let lines = std::fs::read_to_string(log).unwrap();
        assert_eq!(lines.matches(r#""event":"used""#).count(), 2, "{lines}");
    }
}
