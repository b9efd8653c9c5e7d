// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Symbols, with an index by name and one by address.

use std::sync::OnceLock;

use super::names::{MAX_NAME, Names};
use crate::name_index::{MAX_SAME, NameIndex};

/// A symbol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Its name, without a module's.
    pub name: String,
    /// The letter that /proc/kallsyms has: T for text, D for data and so on. Kernels are not
    /// careful with it.
    pub kind: char,
    /// Guest-virtual address, or a per-CPU symbol's offset.
    pub address: u64,
}

/// All symbols of the kernel, without those of modules.
#[derive(Debug)]
pub struct Symbols {
    pub(super) names: Names,
    pub(super) addresses: Vec<u64>,
    by_name: NameIndex,
    /// Numbers by ascending address, made when it is first needed.
    by_address: OnceLock<Vec<u32>>,
}

impl Symbols {
    pub(super) fn new(names: Names) -> Self {
        let (mut by_name, mut name) = (NameIndex::default(), Vec::with_capacity(MAX_NAME));
        for (number, index) in (0..).zip(0..names.len()) {
            if names.expand(index, &mut name).is_some() {
                by_name.add(&name, number);
            }
        }
        by_name.sort();
        Self { names, addresses: Vec::new(), by_name, by_address: OnceLock::new() }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.names.len()
    }

    /// Whether there is no symbol.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The address of the first symbol with this name. Static symbols of several files can share a
    /// name.
    pub fn get(&self, name: &str) -> Option<u64> {
        self.all(name).next()
    }

    /// The addresses of all symbols with this name, at most 4,096.
    pub fn all(&self, name: &str) -> impl Iterator<Item = u64> {
        self.numbers(name).filter_map(|index| self.addresses.get(index).copied())
    }

    /// The symbol at `address`, or the nearest below it.
    pub fn nearest(&self, address: u64) -> Option<Symbol> {
        let order = self.by_address();
        let above = order.partition_point(|index| self.at(*index) <= address);
        let nearest = order.get(..above)?.last().map(|index| self.at(*index))?;
        // Of several at that address the first.
        let first = order.partition_point(|index| self.at(*index) < nearest);
        self.symbol(*order.get(first)? as usize)
    }

    /// The symbols at `address`, at most 4,096: a function can have several names.
    pub fn at_address(&self, address: u64) -> impl Iterator<Item = Symbol> {
        let order = self.by_address();
        let first = order.partition_point(|index| self.at(*index) < address);
        let same = order.iter().skip(first).take_while(move |index| self.at(**index) == address);
        same.take(MAX_SAME).filter_map(|index| self.symbol(*index as usize))
    }

    /// The lowest address of a symbol above `address`.
    pub fn above(&self, address: u64) -> Option<u64> {
        let order = self.by_address();
        let above = order.partition_point(|index| self.at(*index) <= address);
        order.get(above).map(|index| self.at(*index))
    }

    fn by_address(&self) -> &[u32] {
        self.by_address.get_or_init(|| {
            let mut order: Vec<u32> = (0..).take(self.addresses.len()).collect();
            order.sort_by_key(|index| self.at(*index));
            order
        })
    }

    fn at(&self, index: u32) -> u64 {
        self.addresses.get(index as usize).copied().unwrap_or(u64::MAX)
    }

    /// All symbols, in the kernel's order.
    pub fn iter(&self) -> impl Iterator<Item = Symbol> {
        (0..self.len()).filter_map(|index| self.symbol(index))
    }

    fn symbol(&self, index: usize) -> Option<Symbol> {
        let mut name = Vec::new();
        let kind = char::from(self.names.expand(index, &mut name)?);
        let name = String::from_utf8_lossy(&name).into_owned();
        Some(Symbol { name, kind, address: *self.addresses.get(index)? })
    }

    /// The numbers of the symbols with this name, ascending, at most [`MAX_SAME`].
    pub(super) fn numbers(&self, name: &str) -> impl Iterator<Item = usize> {
        let mut found = Vec::new();
        let candidates = self.by_name.candidates(name.as_bytes()).map(|index| index as usize);
        let same = candidates.filter(move |index| {
            self.names.expand(*index, &mut found).is_some() && found == name.as_bytes()
        });
        same.take(MAX_SAME)
    }
}
