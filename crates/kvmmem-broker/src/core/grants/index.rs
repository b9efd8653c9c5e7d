// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds a token among thousands without comparing it to each.

use std::collections::BTreeSet;
use std::collections::hash_map::RandomState;
use std::fmt;
use std::hash::BuildHasher;

use kvmmem_kvmi::token::Token;
use subtle::ConstantTimeEq;

/// Keyed hashes of tokens, and the grants that they belong to. The key is this process's secret:
/// what the order of the hashes or the time of a search may tell is of no use for guessing a token.
/// What a hash finds is compared in full, in constant time.
#[derive(Clone, Default)]
pub(super) struct TokenIndex {
    hasher: RandomState,
    entries: BTreeSet<(u64, u64)>,
}

impl TokenIndex {
    pub(super) fn insert(&mut self, token: &Token, id: u64) {
        self.entries.insert((self.hash(token), id));
    }

    pub(super) fn remove(&mut self, token: &Token, id: u64) {
        self.entries.remove(&(self.hash(token), id));
    }

    /// The grant of a token; `token_of` has the tokens themselves.
    pub(super) fn find<'t>(
        &self,
        token: &Token,
        token_of: impl Fn(u64) -> Option<&'t Token>,
    ) -> Option<u64> {
        let hash = self.hash(token);
        let alike = self.entries.range((hash, 0)..=(hash, u64::MAX)).map(|(_, id)| *id);
        alike.filter(|id| token_of(*id).is_some_and(|other| other.ct_eq(token).into())).last()
    }

    #[cfg(test)]
    pub(super) fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn hash(&self, token: &Token) -> u64 {
        let words = zeroize::Zeroizing::new(token.words());
        self.hasher.hash_one(words.as_slice())
    }
}

impl fmt::Debug for TokenIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TokenIndex({})", self.entries.len())
    }
}
