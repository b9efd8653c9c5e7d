// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tokens of KVMI for tools in an introspector under the stock QEMU of this machine, of which the
//! test is the guest: they are listed in the descriptor of a view that is plugged in for them.

mod common;

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};

use common::pair::{CID, Pair, eject, number, pages, slots, state, write};
use common::{caller, wait_for};
use kvmmem_abi::descriptor::{FLAG_TOKENS, FLAGS_AT};
use kvmmem_abi::errno::KvmError;
use kvmmem_abi::native::{STATE_OPEN, STATE_REVOKED};
use kvmmem_abi::token_list::{
    DIGESTS_AT, Digest, END, MAX_TOKENS, digest, digest_at, mark, used_at,
};
use kvmmem_client::admin::OnSilence;
use kvmmem_kvmi::token::Token;
use kvmmem_proto::endpoint::Endpoint;
use kvmmem_proto::guest::MappedBy;
use kvmmem_proto::message::GrantState;
use sha2::{Digest as _, Sha256};

/// A target's hook to a tool in the introspector, and what that tool does.
struct Tool<'a> {
    pair: &'a Pair,
    target: u64,
    vm: u64,
    endpoint: Endpoint,
}

impl<'a> Tool<'a> {
    fn hooked(pair: &'a Pair) -> Self {
        // Nothing listens there: the test asks for tokens as a connected tool would.
        let endpoint = Endpoint::Vsock { cid: CID, port: 9 };
        pair.broker.admin().hook("tiger", &endpoint).unwrap();
        let vms = pair.broker.admin().targets().unwrap();
        let id = |name: &str| vms.iter().find(|vm| vm.identity.name == name).unwrap().id;
        Self { pair, target: id("tiger"), vm: id("watcher"), endpoint }
    }

    fn mint(&self) -> Result<Token, KvmError> {
        self.pair.broker.service.mint_token(self.target, Some(self.vm))
    }

    /// A token and its grant. A tool that is asked to come again does.
    fn token(&self) -> (Token, u64) {
        let mut token = None;
        wait_for("a token", || match self.mint() {
            Ok(minted) => {
                token = Some(minted);
                true
            }
            Err(error) => {
                assert_eq!(error, KvmError::Again);
                false
            }
        });
        let newest = self.pair.broker.grants().iter().map(|grant| grant.id).max().unwrap();
        (token.unwrap(), newest)
    }

    /// A token that the driver has used, as the broker knows, and its grant. On a slow machine one
    /// may expire before.
    fn used(&self) -> u64 {
        for _ in 0..50 {
            let (token, grant) = self.token();
            if uses(&self.page(), &token) {
                wait_for("the use to be known", || self.state(grant) != Some(GrantState::Active));
                if self.state(grant) == Some(GrantState::Spent) {
                    assert!(
                        self.pair
                            .introspector
                            .open(&token, &caller(), false, MappedBy::Module)
                            .is_err()
                    );
                    return grant;
                }
            }
        }
        panic!("every token expires");
    }

    fn page(&self) -> OwnedFd {
        wait_for("QEMU to have one page", || pages(self.pair.qemu.process.id()).len() == 1);
        pages(self.pair.qemu.process.id()).remove(0)
    }

    fn state(&self, grant: u64) -> Option<GrantState> {
        let grants = self.pair.broker.grants();
        grants.iter().find(|other| other.id == grant).map(|grant| grant.state)
    }
}

/// The entry of a page's list that has a token.
fn entry(page: &OwnedFd, token: &Token) -> Option<usize> {
    let wanted = digest(&Sha256::digest(token.to_bytes()).into());
    (0..MAX_TOKENS).find(|entry| {
        let mut listed: Digest = Default::default();
        rustix::io::pread(page, &mut listed, digest_at(*entry) as u64).unwrap();
        listed == wanted
    })
}

/// What the driver does for MAP, where the token is still listed.
fn uses(page: &OwnedFd, token: &Token) -> bool {
    let Some(entry) = entry(page, token) else { return false };
    let mark = mark(&digest(&Sha256::digest(token.to_bytes()).into()));
    write(page, used_at(entry), &mark.to_le_bytes());
    self::entry(page, token).is_some()
}

#[test]
fn a_token_of_kvmi_is_listed_until_it_is_used_expires_or_opens_a_view() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    let _driver = pair.driver();
    let tool = Tool::hooked(&pair);
    tool.used();
    let page = tool.page();
    assert_eq!(number(&page, FLAGS_AT - 4) >> 32, u64::from(FLAG_TOKENS));
    assert_eq!(pair.counts(), (2, 2));

    // One that is not used; the view is there already.
    let (token, _) = tool.token();
    wait_for("it to expire", || entry(&page, &token).is_none());
    assert!(!uses(&page, &token));

    // One that is used for a view of its own.
    let mut opened = None;
    wait_for("a view", || {
        let (token, _) = tool.token();
        opened = pair.introspector.open(&token, &caller(), false, MappedBy::Module).ok();
        assert_eq!(entry(&page, &token), None);
        opened.is_some()
    });
    assert_eq!(pair.counts(), (4, 4));
    drop(opened);

    // No more than so many wait at a time, and one that was used makes room.
    let is_refused = |_| tool.mint() == Err(KvmError::Again);
    wait_for("the limit", || (0..=MAX_TOKENS).any(is_refused));
    tool.used();
    wait_for("the other view to go", || pair.counts() == (2, 2));
}

#[test]
fn a_view_for_tokens_ends_with_its_grant_a_page_s_grant_and_the_last_hook() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    let _driver = pair.driver();
    let tool = Tool::hooked(&pair);
    let revoke = |grant| {
        let revoked = pair.broker.admin().revoke(grant).unwrap();
        assert_eq!(revoked.unconfirmed, 0);
    };
    let is_closed = || {
        assert_eq!(pair.counts().0, 0);
        wait_for("QEMU to close what it was given", || pages(pair.qemu.process.id()).is_empty());
    };
    // Its own grant, which is the only one with a view.
    tool.token();
    let page = tool.page();
    let grants = pair.broker.grants();
    revoke(grants.iter().find(|grant| !grant.views.is_empty()).unwrap().id);
    assert_eq!(state(&page), STATE_REVOKED);
    is_closed();

    // The grant of a token that was not used, and of one that was.
    let (unused, grant) = tool.token();
    let page = tool.page();
    revoke(grant);
    assert_eq!((entry(&page, &unused), state(&page)), (None, STATE_OPEN));
    revoke(tool.used());
    assert_eq!(state(&page), STATE_REVOKED);
    is_closed();

    // The last hook.
    tool.token();
    let second = Endpoint::Vsock { cid: CID, port: 10 };
    let mut admin = pair.broker.admin();
    admin.hook("tiger", &second).unwrap();
    admin.unhook("tiger", &tool.endpoint).unwrap();
    assert_eq!(pair.counts().0, 2);
    admin.unhook("tiger", &second).unwrap();
    is_closed();
}

#[test]
fn where_no_view_can_be_plugged_in_tokens_are_for_views_alone() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    let tool = Tool::hooked(&pair);
    // There is no driver: the tool is asked to come again until the broker has given up.
    let (token, _) = tool.token();
    assert!(pages(pair.qemu.process.id()).iter().all(|page| entry(page, &token).is_none()));
}

/// The uses of tokens by a guest whose view ends before the broker has looked at the marks.
#[test]
fn a_use_is_known_though_the_view_has_ended_at_once() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    let _driver = pair.driver();
    let tool = Tool::hooked(&pair);
    for _ in 0..5 {
        let (token, grant) = tool.token();
        let is_used = uses(&tool.page(), &token);
        let grants = pair.broker.grants();
        let of_view = grants.iter().find(|grant| !grant.views.is_empty()).unwrap().id;
        pair.broker.admin().revoke(of_view).unwrap();
        // On a slow machine the token may have expired before it was used.
        assert!(
            !is_used || tool.state(grant) == Some(GrantState::Spent),
            "{:?}",
            tool.state(grant)
        );
        assert!(pair.introspector.open(&token, &caller(), false, MappedBy::Module).is_err());
    }
}

#[test]
fn a_guest_that_scribbles_over_the_list_harms_its_own_tokens_alone() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    let _driver = pair.driver();
    let tool = Tool::hooked(&pair);
    tool.token();
    let (page, stop) = (tool.page(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut bytes = [0; END - DIGESTS_AT];
            while !stop.load(Ordering::Relaxed) {
                getrandom::fill(&mut bytes).unwrap();
                // Marks every token as used, or as another one.
                for entry in 0..MAX_TOKENS {
                    let mut listed: Digest = Default::default();
                    rustix::io::pread(&page, &mut listed, digest_at(entry) as u64).unwrap();
                    write(&page, used_at(entry), &mark(&listed).to_le_bytes());
                }
                write(&page, DIGESTS_AT, &bytes);
            }
        });
        for _ in 0..500 {
            assert!(matches!(tool.mint(), Ok(_) | Err(KvmError::Again)));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!((pair.counts(), state(&page)), ((2, 2), STATE_OPEN));
    // What it wrote is overwritten by the next tokens.
    tool.used();
}

#[test]
fn tools_that_ask_at_once_get_one_view() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    let _driver = pair.driver();
    let tool = Tool::hooked(&pair);
    std::thread::scope(|scope| {
        (0..16).for_each(|_| drop(scope.spawn(|| drop(tool.token()))));
    });
    assert_eq!((pair.counts(), pages(pair.qemu.process.id()).len()), ((2, 2), 1));
}

/// A guest that releases the view's devices whenever they come has no more than one view.
#[test]
fn a_guest_that_unplugs_in_a_storm_has_one_view_at_a_time() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    let _driver = pair.driver();
    let tool = Tool::hooked(&pair);
    for _ in 0..10 {
        wait_for("a view that lists a token", || {
            let (token, _) = tool.token();
            pages(pair.qemu.process.id()).iter().any(|page| entry(page, &token).is_some())
        });
        let mut monitor = pair.monitor.lock().unwrap();
        let slots = slots(&mut monitor);
        assert!(slots.count_ones() <= 1, "{slots:#x}");
        eject(&mut monitor, slots);
    }
    wait_for("the last view to go", || {
        let grants = pair.broker.grants();
        pair.counts() == (0, 0) && grants.iter().all(|grant| grant.views.is_empty())
    });
    tool.used();
}

#[test]
fn hooks_that_come_and_go_in_a_storm_leave_nothing() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    let _driver = pair.driver();
    let tool = Tool::hooked(&pair);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    assert!(matches!(tool.mint(), Ok(_) | Err(KvmError::Again)));
                }
            });
        }
        let mut admin = pair.broker.admin();
        for _ in 0..20 {
            admin.unhook("tiger", &tool.endpoint).unwrap();
            admin.hook("tiger", &tool.endpoint).unwrap();
        }
        stop.store(true, Ordering::Relaxed);
    });
    pair.broker.admin().unhook("tiger", &tool.endpoint).unwrap();
    wait_for("all to go", || {
        let grants = pair.broker.grants();
        let is_used = grants.iter().any(|grant| !grant.views.is_empty());
        !is_used && pair.counts() == (0, 0) && pages(pair.qemu.process.id()).is_empty()
    });
}
