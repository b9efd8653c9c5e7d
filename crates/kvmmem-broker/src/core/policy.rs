// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What tokens allow that KVMI makes, for each target. Kept by UUID as long as the broker lives,
//! whether the target is registered or not.

use std::collections::HashMap;

use kvmmem_proto::credentials::Credentials;
use kvmmem_proto::message::KvmiPolicy;
use uuid::Uuid;

use super::quota::{Bound, Quota, QuotaError};

/// The policies of all targets.
#[derive(Clone, Debug)]
pub(crate) struct Policies {
    default: KvmiPolicy,
    /// With the user who set it first.
    of: HashMap<Uuid, (KvmiPolicy, u32)>,
    quota: Quota,
}

/// Why a policy was not set: there are too many.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("policies that are not the default, which is {default}")]
pub(crate) struct TooManyPolicies {
    default: KvmiPolicy,
    source: QuotaError,
}

impl Policies {
    /// No policies, of so many.
    pub(crate) fn new(bound: Bound) -> Self {
        Self { default: KvmiPolicy::default(), of: HashMap::new(), quota: Quota::new(bound) }
    }

    /// The policy of targets for which none was set.
    pub(crate) fn set_default(&mut self, policy: KvmiPolicy) {
        self.default = policy;
    }

    /// The policy of a target.
    pub(crate) fn of(&self, target: Uuid) -> KvmiPolicy {
        self.of.get(&target).map_or(self.default, |(policy, _)| *policy)
    }

    /// Sets the policy of a target. Tokens that it has already stay as they are. The default takes
    /// no place.
    pub(crate) fn set(
        &mut self,
        target: Uuid,
        policy: KvmiPolicy,
        by: Credentials,
    ) -> Result<(), TooManyPolicies> {
        if policy == self.default {
            if let Some((_, uid)) = self.of.remove(&target) {
                self.quota.give_back(uid);
            }
        } else if let Some((known, _)) = self.of.get_mut(&target) {
            *known = policy;
        } else {
            let too_many = |source| TooManyPolicies { default: self.default, source };
            self.quota.take(by).map_err(too_many)?;
            self.of.insert(target, (policy, by.uid));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::limits::MAX_POLICIES;
    use super::*;

    #[test]
    fn a_policy_is_the_target_s_own_or_the_default() {
        let mut policies = Policies::new(Bound::of(MAX_POLICIES));
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        assert_eq!(policies.of(one), KvmiPolicy::ReadWrite);
        policies.set(one, KvmiPolicy::None, user(0)).unwrap();
        policies.set_default(KvmiPolicy::ReadOnly);
        assert_eq!(
            (policies.of(one), policies.of(other)),
            (KvmiPolicy::None, KvmiPolicy::ReadOnly)
        );
        assert_eq!(KvmiPolicy::None.scope(), None);
    }

    #[test]
    fn policies_are_bounded_for_each_user_and_the_default_removes_one() {
        /// No user of the machine that tests run on.
        const USER: u32 = 4_000_000_001;
        let mut policies = Policies::new(Bound::of(MAX_POLICIES));
        let share = Bound::of(MAX_POLICIES).per_user as u128;
        let mut set = |n: u128, policy, uid| policies.set(Uuid::from_u128(n), policy, user(uid));
        for n in 0..share {
            set(n, KvmiPolicy::None, USER).unwrap();
        }
        let refused = set(share, KvmiPolicy::None, USER).unwrap_err();
        assert!(matches!(refused.source, QuotaError::Share { uid: USER, .. }), "{refused:?}");
        // A policy that exists can always be changed or removed.
        set(7, KvmiPolicy::ReadOnly, USER).unwrap();
        set(share, KvmiPolicy::None, 0).unwrap();
        set(7, KvmiPolicy::ReadWrite, 0).unwrap();
        set(share + 1, KvmiPolicy::None, USER).unwrap();
        assert_eq!(policies.of.len() as u128, share + 1);
        for n in 0..share + 2 {
            policies.set(Uuid::from_u128(n), KvmiPolicy::ReadWrite, user(USER)).unwrap();
        }
        assert_eq!((policies.of.len(), policies.quota.count()), (0, 0));
    }

    fn user(uid: u32) -> Credentials {
        Credentials { pid: 1, uid }
    }
}
