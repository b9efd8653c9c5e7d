// SPDX-License-Identifier: GPL-2.0-only
//! Storage of the mapping table: the kernel's red-black tree.

use kernel::prelude::*;
use kernel::rbtree::{RBTree, RBTreeNodeReservation};

use crate::table::map::{Map, Maps};

/// A map from `u64`, ordered.
pub(crate) struct Tree<V>(RBTree<u64, V>);

/// Memory for one more entry; `ENOMEM` where there is none. Charged to the process's memory cgroup.
pub(crate) fn slot<V>() -> Result<RBTreeNodeReservation<u64, V>> {
    RBTreeNodeReservation::new(GFP_KERNEL_ACCOUNT)
}

impl<V> Default for Tree<V> {
    fn default() -> Self {
        Self(RBTree::new())
    }
}

impl<V> Map<V> for Tree<V> {
    type Slot = RBTreeNodeReservation<u64, V>;

    fn insert(&mut self, slot: Self::Slot, key: u64, value: V) {
        self.0.insert(slot.into_node(key, value));
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
        let (&key, _) = self.0.cursor_lower_bound(&key)?.current();
        Some((key, self.0.get(&key)?))
    }
}

/// The kind of maps that the module's tables are made of.
pub(crate) struct Trees;

impl Maps for Trees {
    type Map<V> = Tree<V>;
}
