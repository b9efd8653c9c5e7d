// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Quotas: how many of something there may be, in all and of one user.
//!
//! A user who takes all that it can get must neither keep others out nor those who would put an end
//! to it. So each user but root and the broker's own has a share, and the last few of everything
//! are root's and the broker's own.

use std::collections::BTreeMap;

use kvmmem_proto::credentials::Credentials;

/// How many of something there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bound {
    /// In all.
    pub total: usize,
    /// Of one user that is not an administrator.
    pub per_user: usize,
    /// How many of the total only administrators may take.
    pub reserve: usize,
}

impl Bound {
    /// The usual shares of a total: three quarters for one user, and a sixteenth in reserve.
    pub(crate) const fn of(total: usize) -> Self {
        Self { total, per_user: total / 4 * 3, reserve: total / 16 }
    }
}

/// Why there may not be one more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum QuotaError {
    #[error("user {uid} has {count} already, the most that one user may have; end some of them")]
    Share { uid: u32, count: usize },
    #[error(
        "there are {count} already, and the last {reserve} are for root and the broker's own user"
    )]
    Reserve { count: usize, reserve: usize },
    #[error("there are {0} already; end some of them")]
    Total(usize),
}

/// How many of something there are, and whose they are.
#[derive(Clone, Debug)]
pub(crate) struct Quota {
    bound: Bound,
    total: usize,
    /// Of each user that has any.
    of: BTreeMap<u32, usize>,
}

impl Quota {
    pub(crate) fn new(bound: Bound) -> Self {
        Self { bound, total: 0, of: BTreeMap::new() }
    }

    /// Takes one for a user.
    pub(crate) fn take(&mut self, who: Credentials) -> Result<(), QuotaError> {
        let Bound { total, per_user, reserve } = self.bound;
        if self.total >= total {
            return Err(QuotaError::Total(total));
        }
        let has = self.of.get(&who.uid).copied().unwrap_or(0);
        let others = total.saturating_sub(reserve);
        if !who.is_administrator() && has >= per_user {
            return Err(QuotaError::Share { uid: who.uid, count: per_user });
        }
        if !who.is_administrator() && self.total >= others {
            return Err(QuotaError::Reserve { count: others, reserve });
        }
        self.of.insert(who.uid, has + 1);
        self.total += 1;
        Ok(())
    }

    /// Gives back what a user has taken.
    pub(crate) fn give_back(&mut self, uid: u32) {
        if let Some(has) = self.of.get_mut(&uid) {
            *has -= 1;
            self.total -= 1;
            if *has == 0 {
                self.of.remove(&uid);
            }
        }
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.total
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(uid: u32) -> Credentials {
        Credentials { pid: 1, uid }
    }

    /// No user of the machine that tests run on, and root.
    const ONE: u32 = 4_000_000_001;
    const OTHER: u32 = 4_000_000_002;
    const ROOT: u32 = 0;

    #[test]
    fn a_user_has_a_share_and_root_the_rest() {
        let mut quota = Quota::new(Bound { total: 10, per_user: 5, reserve: 2 });
        for _ in 0..5 {
            quota.take(user(ONE)).unwrap();
        }
        assert_eq!(quota.take(user(ONE)), Err(QuotaError::Share { uid: ONE, count: 5 }));
        for _ in 0..3 {
            quota.take(user(OTHER)).unwrap();
        }
        let reserved = Err(QuotaError::Reserve { count: 8, reserve: 2 });
        assert_eq!(quota.take(user(OTHER)), reserved);
        assert_eq!(quota.take(user(OTHER + 1)), reserved);
        quota.take(user(ROOT)).unwrap();
        quota.take(user(ROOT)).unwrap();
        assert_eq!(quota.take(user(ROOT)), Err(QuotaError::Total(10)));
        quota.give_back(ONE);
        quota.take(user(ROOT)).unwrap();
        assert_eq!(quota.count(), 10);
    }

    #[test]
    fn what_is_given_back_leaves_no_trace() {
        let mut quota = Quota::new(Bound { total: 3, per_user: 3, reserve: 0 });
        for uid in 1..1000 {
            quota.take(user(uid)).unwrap();
            quota.give_back(uid);
            quota.give_back(uid);
        }
        assert_eq!((quota.count(), quota.of.len()), (0, 0));
    }
}
