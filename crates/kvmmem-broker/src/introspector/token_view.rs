// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A view for tokens: the guest's driver serves MAP of v1 and v2 from it, for the tokens that its
//! descriptor page lists.
//!
//! A token is listed from the moment in which it is made until the driver has used it, it has
//! expired, or it is used otherwise. Each use is reported to the broker as a VMM of ours reports
//! it.

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvmmem_abi::errno::KvmError;
use kvmmem_abi::token_list::{Digest, digest};
use kvmmem_kvmi::token::Token;
use kvmmem_qemu::windows::token_list::TokenList;
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::inbox::Inbox;
use super::link::Link;
use super::view::View;
use crate::sync::lock;

/// How soon the driver's marks are looked at again while tokens are listed.
const LOOK: Duration = Duration::from_millis(100);

/// A view, and the tokens that its page lists.
#[derive(Debug)]
pub(crate) struct TokenView {
    pub(super) view: Arc<View>,
    listed: Mutex<ListedTokens>,
    /// Of the introspector's thread, which looks at the marks while tokens are listed.
    inbox: Arc<Inbox>,
}

#[derive(Debug)]
struct ListedTokens {
    list: TokenList,
    tokens: Vec<ListedToken>,
}

#[derive(Debug)]
struct ListedToken {
    entry: usize,
    digest: Digest,
    grant: u64,
    expires: Instant,
}

impl TokenView {
    /// The view with an empty list; `None` where it has no page.
    pub(super) fn new(view: Arc<View>, inbox: Arc<Inbox>) -> Option<Self> {
        let page = lock(&view.pages).as_ref()?.files().first().map(Arc::clone)?;
        let listed = ListedTokens { list: TokenList::new(page), tokens: Vec::new() };
        Some(Self { view, listed: Mutex::new(listed), inbox })
    }

    /// Lists a token that is about to be given out and lives for `lifetime`.
    ///
    /// # Errors
    /// EAGAIN where the list is full or the view has ended, ENOMEM where the page cannot be
    /// written.
    pub(crate) fn list(
        &self,
        token: &Token,
        grant: u64,
        lifetime: Duration,
    ) -> Result<(), KvmError> {
        let mut listed = lock(&self.listed);
        if self.view.end().is_some() {
            return Err(KvmError::Again);
        }
        let digest = digest_of(token);
        let entry = listed.list.add(digest).map_err(|_| KvmError::NoMem)?;
        let entry = entry.ok_or(KvmError::Again)?;
        let expires = Instant::now() + lifetime;
        listed.tokens.push(ListedToken { entry, digest, grant, expires });
        if listed.tokens.len() == 1 {
            self.inbox.wake();
        }
        Ok(())
    }

    /// Withdraws the tokens that were used or have expired, all of them once the view has ended,
    /// and reports the uses; returns when to look again, where any are left.
    pub(super) fn tend(&self, link: &Link, now: Instant) -> Option<Instant> {
        let mut listed = lock(&self.listed);
        // No token is listed from then on.
        let has_ended = self.view.end().is_some();
        let is_over = |one: &ListedToken| has_ended || one.expires <= now;
        listed.remove(link, |one, list| is_over(one) || list.is_used(one.entry));
        listed.tokens.iter().map(|one| one.expires.min(now + LOOK)).min()
    }

    /// Whether the view has ended and all uses are reported.
    pub(super) fn is_settled(&self) -> bool {
        self.view.end().is_some() && lock(&self.listed).tokens.is_empty()
    }

    /// Withdraws a token that is about to be used otherwise, and reports its use where the driver
    /// was first.
    pub(super) fn withdraw(&self, link: &Link, token: &Token) {
        let digest = digest_of(token);
        lock(&self.listed).remove(link, |one, _| one.digest == digest);
    }

    /// Withdraws the token of a grant that is revoked, and reports its use where the driver was
    /// first. Returns whether the driver had used it.
    pub(super) fn revoke(&self, link: &Link, grant: u64) -> bool {
        lock(&self.listed).remove(link, |one, _| one.grant == grant)
    }
}

impl ListedTokens {
    /// Withdraws the tokens that `is_meant` picks, and reports those that the driver has used;
    /// whether there were any. A revocation waits for that at the list's lock: it finds a use here
    /// or in the broker's tables.
    fn remove(&mut self, link: &Link, is_meant: impl Fn(&ListedToken, &TokenList) -> bool) -> bool {
        let mut were_used = false;
        let list = &mut self.list;
        self.tokens.retain(|one| {
            if !is_meant(one, list) {
                return true;
            }
            match list.remove(one.entry) {
                Ok(is_used) => {
                    if is_used {
                        link.used(one.grant);
                    }
                    were_used |= is_used;
                    false
                }
                // A page of memory that is there; tried again.
                Err(error) => {
                    tracing::warn!(%error, "cannot withdraw a token from a view's descriptor");
                    true
                }
            }
        });
        were_used
    }
}

fn digest_of(token: &Token) -> Digest {
    digest(&Sha256::digest(*Zeroizing::new(token.to_bytes())).into())
}
