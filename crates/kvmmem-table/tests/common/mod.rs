// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Storage for tables under test.

use std::collections::BTreeMap;

use kvmmem_table::map::{Map, Maps};

/// A [`Map`] over `BTreeMap`, which also checks that no entry is overwritten.
pub(crate) struct Tree<V>(BTreeMap<u64, V>);

impl<V> Default for Tree<V> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<V> Map<V> for Tree<V> {
    type Slot = ();

    fn insert(&mut self, (): (), key: u64, value: V) {
        assert!(self.0.insert(key, value).is_none(), "the entry of {key:#x} was overwritten");
    }

    fn get(&self, key: u64) -> Option<&V> {
        self.0.get(&key)
    }

    fn get_mut(&mut self, key: u64) -> Option<&mut V> {
        self.0.get_mut(&key)
    }

    fn remove(&mut self, key: u64) -> Option<V> {
        self.0.remove(&key)
    }

    fn first_from(&self, key: u64) -> Option<(u64, &V)> {
        self.0.range(key..).next().map(|(key, value)| (*key, value))
    }
}

/// The kind of [`Tree`]s.
pub(crate) struct Trees;

impl Maps for Trees {
    type Map<V> = Tree<V>;
}
