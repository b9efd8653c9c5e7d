// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The tokens that are outstanding.
//!
//! A token is valid for [`LIFETIME`] and used once. Nothing runs when no token is made or used: expiry is checked at
//! use, and expired tokens are dropped by the next operation. Times come from the caller, who takes them from a
//! monotonic clock.

use std::time::{Duration, Instant};

use kvmmem_kvmi::token::Token;
use subtle::ConstantTimeEq;

/// How long a token lives.
pub const LIFETIME: Duration = Duration::from_secs(3);

/// The most tokens that may be outstanding for one target.
pub const MAX_PER_TARGET: usize = 64;

/// The tokens of all targets.
#[derive(Debug, Default)]
pub struct Grants {
    table: Vec<Grant>,
}

#[derive(Debug)]
struct Grant {
    /// Boxed, so that moving the entry leaves no copy of it behind.
    token: Box<Token>,
    target: u64,
    /// The VM to which the token was pushed; `None` where whoever brings it may have it.
    holder: Option<u64>,
    expires: Instant,
}

/// Why no token was made: the target has [`MAX_PER_TARGET`] outstanding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("target {target} has {MAX_PER_TARGET} tokens outstanding")]
pub struct TooMany {
    /// Number of the target.
    pub target: u64,
}

/// What a token was good for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Redeemed {
    /// This target; the token is used up.
    Target(u64),
    /// It was pushed to the one who asks, and is still there to be claimed.
    Held,
}

impl Grants {
    /// Makes `token` valid from `now` on, for `target`; only `holder` may use it, or anybody where there is none.
    ///
    /// # Errors
    /// [`TooMany`].
    pub fn mint(
        &mut self,
        now: Instant,
        token: Token,
        target: u64,
        holder: Option<u64>,
    ) -> Result<(), TooMany> {
        self.expire(now);
        if self.outstanding(target) >= MAX_PER_TARGET {
            return Err(TooMany { target });
        }
        self.table.push(Grant { token: Box::new(token), target, holder, expires: now + LIFETIME });
        Ok(())
    }

    /// Uses a token on behalf of VM `by`; `None` where it is unknown, used, expired or somebody else's.
    pub fn redeem(&mut self, now: Instant, token: &Token, by: u64) -> Option<Redeemed> {
        self.expire(now);
        let index = self.find(token)?;
        match self.table.get(index)?.holder {
            None => Some(Redeemed::Target(self.table.swap_remove(index).target)),
            Some(holder) if holder == by => Some(Redeemed::Held),
            Some(_) => None,
        }
    }

    /// Takes a token out that VM `by`, its holder, has used.
    pub fn used(&mut self, now: Instant, token: &Token, by: u64) -> Option<u64> {
        self.expire(now);
        let index = self.find(token)?;
        if self.table.get(index)?.holder != Some(by) {
            return None;
        }
        Some(self.table.swap_remove(index).target)
    }

    /// Lets anybody use a token that could not be pushed to its holder.
    pub fn release(&mut self, token: &Token) {
        if let Some(grant) = self.find(token).and_then(|index| self.table.get_mut(index)) {
            grant.holder = None;
        }
    }

    /// Voids every token of which this VM is the target or the holder.
    pub fn forget(&mut self, vm: u64) {
        self.table.retain(|grant| grant.target != vm && grant.holder != Some(vm));
    }

    /// How many tokens of a target are in the table; [`Self::mint`] drops the expired ones first.
    pub fn outstanding(&self, target: u64) -> usize {
        self.table.iter().filter(|grant| grant.target == target).count()
    }

    fn expire(&mut self, now: Instant) {
        self.table.retain(|grant| grant.expires > now);
    }

    /// The place of a token. Every entry is compared in full, whichever matches.
    fn find(&self, token: &Token) -> Option<usize> {
        let mut found = None;
        for (index, grant) in self.table.iter().enumerate() {
            if bool::from(grant.token.ct_eq(token)) {
                found = Some(index);
            }
        }
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Copy, Debug)]
    enum Step {
        Mint { token: u64, target: u64, holder: Option<u64> },
        Redeem { token: u64, by: u64 },
        Used { token: u64, by: u64 },
        Release { token: u64 },
        Forget { vm: u64 },
        Wait { ms: u64 },
    }

    fn any_step() -> impl Strategy<Value = Step> {
        let (token, vm) = (0u64..6, 0u64..3);
        prop_oneof![
            3 => (token.clone(), vm.clone(), proptest::option::of(vm.clone()))
                .prop_map(|(token, target, holder)| Step::Mint { token, target, holder }),
            3 => (token.clone(), vm.clone()).prop_map(|(token, by)| Step::Redeem { token, by }),
            2 => (token.clone(), vm.clone()).prop_map(|(token, by)| Step::Used { token, by }),
            1 => token.prop_map(|token| Step::Release { token }),
            1 => vm.prop_map(|vm| Step::Forget { vm }),
            2 => (0u64..4000).prop_map(|ms| Step::Wait { ms }),
        ]
    }

    /// What a token should be: who may use it, for what, until when.
    #[derive(Clone, Copy)]
    struct Expected {
        target: u64,
        holder: Option<u64>,
        expires_ms: u64,
    }

    proptest! {
        #[test]
        fn the_table_does_as_a_model_does(steps in proptest::collection::vec(any_step(), 0..80)) {
            let start = Instant::now();
            let mut clock_ms = 0;
            let mut grants = Grants::default();
            let mut model: [Option<Expected>; 6] = [None; 6];
            for step in steps {
                let now = start + Duration::from_millis(clock_ms);
                let live = |model: &[Option<Expected>; 6], token: u64| {
                    model[usize::try_from(token).unwrap()].filter(|entry| entry.expires_ms > clock_ms)
                };
                let name = |token| Token::new([token, 0, 0, 7]);
                match step {
                    // Tokens are random: no live one is ever made again.
                    Step::Mint { token, .. } if live(&model, token).is_some() => {}
                    Step::Mint { token, target, holder } => {
                        prop_assert_eq!(grants.mint(now, name(token), target, holder), Ok(()));
                        let expires_ms = clock_ms + 3000;
                        model[usize::try_from(token).unwrap()] = Some(Expected { target, holder, expires_ms });
                    }
                    Step::Redeem { token, by } => {
                        let expected = match live(&model, token) {
                            Some(Expected { holder: None, target, .. }) => {
                                model[usize::try_from(token).unwrap()] = None;
                                Some(Redeemed::Target(target))
                            }
                            Some(Expected { holder, .. }) if holder == Some(by) => Some(Redeemed::Held),
                            _ => None,
                        };
                        prop_assert_eq!(grants.redeem(now, &name(token), by), expected);
                    }
                    Step::Used { token, by } => {
                        let expected = live(&model, token).filter(|entry| entry.holder == Some(by));
                        if expected.is_some() {
                            model[usize::try_from(token).unwrap()] = None;
                        }
                        prop_assert_eq!(grants.used(now, &name(token), by), expected.map(|entry| entry.target));
                    }
                    Step::Release { token } => {
                        grants.release(&name(token));
                        if let Some(entry) = &mut model[usize::try_from(token).unwrap()] {
                            entry.holder = None;
                        }
                    }
                    Step::Forget { vm } => {
                        grants.forget(vm);
                        for entry in &mut model {
                            if entry.is_some_and(|entry| entry.target == vm || entry.holder == Some(vm)) {
                                *entry = None;
                            }
                        }
                    }
                    Step::Wait { ms } => clock_ms += ms,
                }
                grants.expire(start + Duration::from_millis(clock_ms));
                let live = model.iter().flatten().filter(|entry| entry.expires_ms > clock_ms).count();
                prop_assert_eq!(grants.table.len(), live);
            }
        }
    }

    #[test]
    fn a_target_has_at_most_64_tokens() {
        let (mut grants, now) = (Grants::default(), Instant::now());
        for n in 0..64 {
            grants.mint(now, Token::new([n, 0, 0, 0]), 1, None).unwrap();
        }
        assert_eq!(grants.mint(now, Token::new([64, 0, 0, 0]), 1, None), Err(TooMany { target: 1 }));
        grants.mint(now, Token::new([65, 0, 0, 0]), 2, None).unwrap();
        let later = now + LIFETIME;
        grants.mint(later, Token::new([66, 0, 0, 0]), 1, None).unwrap();
        assert_eq!(grants.table.len(), 1);
    }

    #[test]
    fn a_token_dies_three_seconds_after_it_was_made() {
        let (mut grants, now) = (Grants::default(), Instant::now());
        let token = Token::new([1, 2, 3, 4]);
        grants.mint(now, token.clone(), 9, None).unwrap();
        let last = now + LIFETIME - Duration::from_nanos(1);
        assert_eq!(grants.redeem(last, &token, 1), Some(Redeemed::Target(9)));
        grants.mint(now, token.clone(), 9, None).unwrap();
        assert_eq!(grants.redeem(now + LIFETIME, &token, 1), None);
    }
}
