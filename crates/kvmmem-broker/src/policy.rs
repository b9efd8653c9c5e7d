// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What tokens allow that KVMI makes, for each target. Kept by UUID as long as the broker lives, whether the target is
//! registered or not.

use std::collections::HashMap;

use uuid::Uuid;

use crate::scope::{Rights, Scope};
use crate::wire::KvmiPolicy;

/// The most targets that have a policy of their own.
pub const MAX_POLICIES: usize = 4096;

/// The policies of all targets.
#[derive(Debug, Default)]
pub struct Policies {
    default: KvmiPolicy,
    of: HashMap<Uuid, KvmiPolicy>,
}

/// Why a policy was not set: there are [`MAX_POLICIES`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{MAX_POLICIES} targets have a policy already; restart the broker with --kvmi-tokens for a common one"
)]
pub struct TooManyPolicies;

impl Policies {
    /// The policy of targets for which none was set.
    pub fn set_default(&mut self, policy: KvmiPolicy) {
        self.default = policy;
    }

    /// The policy of a target.
    pub fn of(&self, target: Uuid) -> KvmiPolicy {
        self.of.get(&target).copied().unwrap_or(self.default)
    }

    /// Sets the policy of a target. Tokens that it has already stay as they are.
    ///
    /// # Errors
    /// [`TooManyPolicies`].
    pub fn set(&mut self, target: Uuid, policy: KvmiPolicy) -> Result<(), TooManyPolicies> {
        if self.of.len() >= MAX_POLICIES && !self.of.contains_key(&target) {
            return Err(TooManyPolicies);
        }
        self.of.insert(target, policy);
        Ok(())
    }
}

impl KvmiPolicy {
    /// What a token allows; `None` where none is made.
    pub fn scope(self) -> Option<Scope> {
        match self {
            Self::ReadWrite => Some(Scope::whole(Rights::ReadWrite)),
            Self::ReadOnly => Some(Scope::whole(Rights::ReadOnly)),
            Self::None => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_policy_is_the_target_s_own_or_the_default() {
        let mut policies = Policies::default();
        let (one, other) = (Uuid::from_u128(1), Uuid::from_u128(2));
        assert_eq!(policies.of(one), KvmiPolicy::ReadWrite);
        policies.set(one, KvmiPolicy::None).unwrap();
        policies.set_default(KvmiPolicy::ReadOnly);
        assert_eq!((policies.of(one), policies.of(other)), (KvmiPolicy::None, KvmiPolicy::ReadOnly));
        assert_eq!(KvmiPolicy::None.scope(), None);
    }

    #[test]
    fn policies_are_bounded() {
        let mut policies = Policies::default();
        for n in 0..4096u128 {
            policies.set(Uuid::from_u128(n), KvmiPolicy::None).unwrap();
        }
        assert_eq!(policies.set(Uuid::from_u128(4096), KvmiPolicy::None), Err(TooManyPolicies));
        assert_eq!(policies.set(Uuid::from_u128(7), KvmiPolicy::ReadOnly), Ok(()));
    }
}
