// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Maple trees (`include/linux/maple_tree.h`): ranges of numbers, each with an entry.
//!
//! A node has slots, and between two of them a pivot: the last number of the slot before it. The
//! low bits of a pointer to a node give the node's kind. The tree is the guest's, and changes while
//! it is read: every slot must have a part of its node's numbers, above those of the slot before
//! it, so that no node can be reached twice with success; depth and count are limited as well.

use crate::budget::Budget;
use crate::bytes::Bytes;
use crate::kernel::{Kernel, KernelError};

/// Limit of a process's areas. Linux allows 65,530 unless `vm.max_map_count` is set.
pub(super) const MAX_AREAS: usize = 1 << 20;

/// The deepest tree. One of a million entries has eight levels, with nodes that are half empty.
const MAX_DEPTH: usize = 16;

/// The most nodes that are read.
const MAX_NODES: usize = 1 << 18;

/// The most slots of a node. Linux has 16.
const MAX_SLOTS: u64 = 64;

/// Bits of a pointer to a node: what is left without them is its address.
const NODE_BITS: u64 = 0xff;

/// In these, its kind.
const TYPE_SHIFT: u32 = 3;
const TYPE_MASK: u64 = 0xf;

/// An entry that is a node: two low bits, and an address that no other entry has.
const INTERNAL: u64 = 2;
const INTERNAL_MASK: u64 = 3;
const MIN_NODE: u64 = 4096;

/// An entry, with the first and the last number that it has.
pub(super) type Entry = (u64, (u64, u64));

/// Where everything is in a kernel's nodes.
#[derive(Debug)]
pub(super) struct Tree {
    leaf: u64,
    range: u64,
    arange: u64,
    range_64: Node,
    arange_64: Node,
}

/// Where everything is in one kind of node.
#[derive(Debug)]
struct Node {
    len: u64,
    pivots: u64,
    slots: u64,
    count: u64,
    /// Where the number of the last slot in use is, if the last pivot is 0.
    end: u64,
}

impl Node {
    fn new(kernel: &Kernel<'_>, name: &str) -> Result<Self, KernelError> {
        let slots = kernel.member(name, "slot")?;
        let end = kernel.offset(name, "meta.end")?;
        let node = Self {
            len: kernel.size_of(name)?.max(end + 1),
            pivots: kernel.offset(name, "pivot")?,
            slots: slots.offset,
            count: slots.size / 8,
            end,
        };
        let is_sane = (2..=MAX_SLOTS).contains(&node.count) && node.len <= NODE_BITS + 1;
        is_sane.then_some(node).ok_or_else(|| KernelError::NoType { name: name.to_owned() })
    }
}

impl Tree {
    pub(super) fn new(kernel: &Kernel<'_>) -> Result<Self, KernelError> {
        let kind = |name| kernel.enumerator(name).map(i64::cast_unsigned);
        Ok(Self {
            leaf: kind("maple_leaf_64")?,
            range: kind("maple_range_64")?,
            arange: kind("maple_arange_64")?,
            range_64: Node::new(kernel, "maple_range_64")?,
            arange_64: Node::new(kernel, "maple_arange_64")?,
        })
    }

    /// The entries of the tree whose root is `root` (`maple_tree.ma_root`), by ascending numbers,
    /// and why there are not more where nodes are damaged: their entries are left out. Nodes count
    /// as entries do: there may be any number without one.
    ///
    /// # Errors
    /// [`KernelError::TooMuch`], of the budget.
    pub(super) fn entries(
        &self,
        kernel: &Kernel<'_>,
        root: u64,
        budget: &Budget,
    ) -> Result<(Vec<Entry>, Option<KernelError>), KernelError> {
        let (mut entries, mut lost) = (Vec::new(), None);
        if root == 0 {
            return Ok((entries, lost));
        }
        // A tree that is one entry has it for the number 0 alone, where no process has memory.
        if root & INTERNAL_MASK != INTERNAL || root < MIN_NODE {
            return Ok((entries, Some(malformed(root))));
        }
        let mut nodes = 0;
        // Nodes whose entries come next, the last one first.
        let mut next = vec![(root, (0, u64::MAX), 1)];
        while let Some((pointer, range, depth)) = next.pop() {
            budget.take(size_of::<Entry>())?;
            nodes += 1;
            if nodes > MAX_NODES || entries.len() > MAX_AREAS {
                return Ok((entries, Some(malformed(root))));
            }
            match self.slots(kernel, pointer, range, depth) {
                Ok((slots, true)) => {
                    entries.extend(slots.into_iter().filter(|(entry, _)| *entry != 0))
                }
                Ok((slots, false)) => {
                    next.extend(
                        slots.into_iter().rev().map(|(slot, range)| (slot, range, depth + 1)),
                    );
                }
                Err(error) => lost = lost.or(Some(error)),
            }
        }
        Ok((entries, lost))
    }

    /// The slots of a node, and whether it is a leaf.
    fn slots(
        &self,
        kernel: &Kernel<'_>,
        pointer: u64,
        (first, last): (u64, u64),
        depth: usize,
    ) -> Result<(Vec<Entry>, bool), KernelError> {
        let (gva, kind) = (pointer & !NODE_BITS, pointer >> TYPE_SHIFT & TYPE_MASK);
        let is_leaf = kind == self.leaf;
        let node = match kind {
            _ if is_leaf || kind == self.range => &self.range_64,
            _ if kind == self.arange => &self.arange_64,
            _ => return Err(malformed(gva)),
        };
        if gva == 0 || depth > MAX_DEPTH {
            return Err(malformed(gva));
        }
        let mut bytes = Bytes::zeroed(node.len);
        kernel.read(gva, bytes.as_mut())?;
        let slots = node.slots(&bytes, first, last).ok_or_else(|| malformed(gva))?;
        // Zeros are not a node: the first slot would have all its numbers.
        if bytes.is_zero() { Err(malformed(gva)) } else { Ok((slots, is_leaf)) }
    }
}

fn malformed(gva: u64) -> KernelError {
    KernelError::Malformed { what: "the node of a maple tree".to_owned(), gva }
}

impl Node {
    /// The slots in use, with the numbers that each has of those from `first` to `last`; `None` if
    /// they do not ascend.
    fn slots(&self, bytes: &Bytes, first: u64, last: u64) -> Option<Vec<Entry>> {
        let pivot = |slot: u64| bytes.u64(self.pivots + 8 * slot);
        // The last slot in use (ma_data_end() of the kernel).
        let end = match pivot(self.count - 2) {
            0 => u64::from(bytes.u8(self.end)),
            pivot if pivot == last => self.count - 2,
            _ => self.count - 1,
        };
        let mut slots = Vec::new();
        let mut low = first;
        for slot in (0..=end).take_while(|_| end < self.count) {
            let high = if slot == end { last } else { pivot(slot) };
            if high < low || high > last {
                return None;
            }
            slots.push((bytes.u64(self.slots + 8 * slot), (low, high)));
            if high == last {
                break;
            }
            low = high + 1;
        }
        (!slots.is_empty()).then_some(slots)
    }
}
