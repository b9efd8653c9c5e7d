// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the broker has pushed to a VMM: targets, and tokens for them.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem_kvmi::token::Token;
use kvmmem_proto::scope::Scope;
use subtle::ConstantTimeEq;

use super::target::{PageGrant, Target};

/// The most targets whose files did not arrive: more than a broker has.
const MAX_LOST: usize = 4096;

#[derive(Debug, Default)]
pub(super) struct Cache {
    targets: HashMap<u64, Arc<Target>>,
    grants: Vec<Grant>,
    /// Targets whose files did not arrive, with the numbers of those introductions.
    lost: BTreeMap<u64, u64>,
}

#[derive(Debug)]
struct Grant {
    /// Boxed, so that moving the entry leaves no copy of it behind.
    token: Box<Token>,
    grant: u64,
    target: u64,
    scope: Scope,
    expires: Instant,
}

impl Cache {
    /// Keeps a target; one that had its number before is forgotten.
    pub(super) fn insert_target(&mut self, target: Target) {
        self.lost.remove(&target.id);
        self.targets.insert(target.id, Arc::new(target));
    }

    /// Records that the files of a target did not arrive with this introduction. The broker does
    /// not report the end of a target that it has to introduce again: the oldest ones are
    /// forgotten.
    pub(super) fn lose_target(&mut self, id: u64, introduction: u64) {
        self.lost.insert(id, introduction);
        if self.lost.len() > MAX_LOST {
            self.lost.pop_first();
        }
    }

    /// A target by its number.
    pub(super) fn target(&self, id: u64) -> Option<Arc<Target>> {
        self.targets.get(&id).cloned()
    }

    /// The introduction of a target whose files did not arrive, if they have not arrived since.
    pub(super) fn lost(&self, id: u64) -> Option<u64> {
        self.lost.get(&id).copied()
    }

    /// Keeps a token of grant `grant` for `lifetime`. The broker bounds how many are outstanding;
    /// the expired ones go here.
    pub(super) fn grant(
        &mut self,
        now: Instant,
        token: Token,
        (grant, target, scope): (u64, u64, Scope),
        lifetime: Duration,
    ) {
        self.grants.retain(|grant| grant.expires > now);
        if let Some(expires) = now.checked_add(lifetime) {
            self.grants.push(Grant { token: Box::new(token), grant, target, scope, expires });
        }
    }

    /// Takes a token out, used up from now on, and says what it opens.
    pub(super) fn claim(&mut self, now: Instant, token: &Token) -> Option<PageGrant> {
        self.grants.retain(|grant| grant.expires > now);
        let grant = self.take(token)?;
        Some(PageGrant {
            grant: grant.grant,
            target: self.target(grant.target)?,
            scope: grant.scope,
        })
    }

    /// Takes a token out for good.
    pub(super) fn void(&mut self, token: &Token) {
        self.take(token);
    }

    /// Takes as long for a wrong token as for a right one.
    fn take(&mut self, token: &Token) -> Option<Grant> {
        let mut found = None;
        for (index, grant) in self.grants.iter().enumerate() {
            if bool::from(grant.token.ct_eq(token)) {
                found = Some(index);
            }
        }
        found.map(|index| self.grants.swap_remove(index))
    }

    /// Takes the tokens of a grant out for good.
    pub(super) fn revoke(&mut self, grant: u64) {
        self.grants.retain(|other| other.grant != grant);
    }

    /// Whether a token can be claimed, now or later.
    pub(super) fn has_grants(&self, now: Instant) -> bool {
        self.grants.iter().any(|grant| grant.expires > now)
    }

    /// Forgets a target and its tokens.
    pub(super) fn forget(&mut self, target: u64) {
        self.targets.remove(&target);
        self.lost.remove(&target);
        self.grants.retain(|grant| grant.target != target);
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }
}

#[cfg(test)]
mod tests {
    use kvmmem_proto::map::{MemoryMap, Region};
    use kvmmem_proto::scope::Rights;

    use super::*;
    use uuid::Uuid;

    fn target(id: u64) -> Target {
        let map = MemoryMap::new(vec![Region { gpa: 0, len: 4096, offset: 0, file: 0 }]).unwrap();
        let file = std::fs::File::open("/dev/null").unwrap().into();
        let (name, uuid) = ("t".into(), Uuid::nil());
        Target { id, name, uuid, generation: 1, map, files: Arc::new([file]) }
    }

    fn whole(grant: u64, target: u64) -> (u64, u64, Scope) {
        (grant, target, Scope::whole(Rights::ReadWrite))
    }

    #[test]
    fn a_token_is_claimed_once_before_it_expires() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        let token = Token::new([1, 2, 3, 4]);
        cache.insert_target(target(5));
        cache.grant(now, token.clone(), whole(1, 5), Duration::from_secs(3));
        assert!(cache.claim(now, &Token::new([1, 2, 3, 5])).is_none());
        assert_eq!(cache.claim(now, &token).unwrap().target.id(), 5);
        assert!(cache.claim(now, &token).is_none());
        assert!(!cache.has_grants(now));

        cache.grant(now, token.clone(), whole(1, 5), Duration::from_secs(3));
        assert!(cache.has_grants(now));
        assert!(!cache.has_grants(now + Duration::from_secs(3)));
        assert!(cache.claim(now + Duration::from_secs(3), &token).is_none());
        assert!(cache.grants.is_empty());
    }

    #[test]
    fn a_target_that_is_gone_takes_its_tokens_along() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        cache.insert_target(target(5));
        cache.insert_target(target(6));
        for id in [5, 6] {
            cache.grant(now, Token::new([id, 0, 0, 0]), whole(9, id), Duration::from_secs(3));
        }
        cache.forget(5);
        assert!(cache.claim(now, &Token::new([5, 0, 0, 0])).is_none());
        assert!(cache.claim(now, &Token::new([6, 0, 0, 0])).is_some());
        cache.clear();
        assert!(cache.target(6).is_none());
    }

    #[test]
    fn a_revoked_grant_or_a_void_token_cannot_be_claimed() {
        let (mut cache, now) = (Cache::default(), Instant::now());
        cache.insert_target(target(5));
        for grant in 1..4 {
            cache.grant(now, Token::new([grant, 0, 0, 0]), whole(grant, 5), Duration::from_secs(3));
        }
        cache.revoke(1);
        cache.void(&Token::new([2, 0, 0, 0]));
        assert!(cache.claim(now, &Token::new([1, 0, 0, 0])).is_none());
        assert!(cache.claim(now, &Token::new([2, 0, 0, 0])).is_none());
        assert_eq!(cache.claim(now, &Token::new([3, 0, 0, 0])).unwrap().grant, 3);
    }
}
