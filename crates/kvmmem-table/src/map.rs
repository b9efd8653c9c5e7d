// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Interface of the ordered maps that store the table's records: a red-black tree in the kernel, a
//! `BTreeMap` in tests.

/// An ordered map from `u64` whose insertion cannot fail, because its memory is got beforehand.
pub trait Map<V>: Default {
    /// Memory for one more entry.
    type Slot;

    /// Adds an entry. The key is not in the map.
    fn insert(&mut self, slot: Self::Slot, key: u64, value: V);

    /// The value of `key`.
    fn get(&self, key: u64) -> Option<&V>;

    /// The value of `key`, to change it.
    fn get_mut(&mut self, key: u64) -> Option<&mut V>;

    /// Takes the entry of `key` out.
    fn remove(&mut self, key: u64) -> Option<V>;

    /// The entry with the smallest key that is at least `key`.
    fn first_from(&self, key: u64) -> Option<(u64, &V)>;
}

/// A kind of [`Map`], for values of any type.
pub trait Maps {
    /// The map for values of type `V`.
    type Map<V>: Map<V>;
}
