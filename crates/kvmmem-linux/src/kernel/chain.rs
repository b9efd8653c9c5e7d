// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Chains of hash tables (`struct hlist_head` and `struct hlist_nulls_head`,
//! `include/linux/list_nulls.h`).
//!
//! Unlike a [`super::List`], a chain has an end: a null pointer, or an odd number (a nulls marker)
//! that names the bucket. A walk ends with an error after a node that cannot be read, once it has
//! come back to a node, or once it has seen more nodes than a kernel has.

use super::error::KernelError;
use super::guest_kernel::Kernel;
use super::list::MAX_NODES;

/// The nodes of a chain: addresses of `hlist_node` or `hlist_nulls_node`. It ends after an error.
#[derive(Debug)]
pub struct Chain<'k> {
    kernel: &'k Kernel<'k>,
    /// The place of the first pointer, for errors.
    head: u64,
    next: u64,
    /// Brent's algorithm: a node that was seen, and after how many more the present one takes its
    /// place.
    mark: u64,
    steps: usize,
    until: usize,
    count: usize,
    /// Why what follows the last node cannot be read.
    error: Option<KernelError>,
}

impl<'m> Kernel<'m> {
    /// The nodes of the chain whose head, at `head`, holds the pointer `first`.
    pub fn chain(&self, head: u64, first: u64) -> Chain<'_> {
        Chain {
            kernel: self,
            head,
            next: first,
            mark: 0,
            steps: 0,
            until: 1,
            count: 0,
            error: None,
        }
    }
}

impl Chain<'_> {
    /// What ended the chain, or the next node: the number of a nulls marker (`get_nulls_value()`).
    pub fn nulls(&self) -> Option<u64> {
        (self.next & 1 != 0).then_some(self.next >> 1)
    }
}

impl Iterator for Chain<'_> {
    type Item = Result<u64, KernelError>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Some(error) = self.error.take() {
            return Some(Err(error));
        }
        let node = self.next;
        if node == 0 || node & 1 != 0 {
            return None;
        }
        if node == self.mark || self.count >= MAX_NODES {
            self.next = 0;
            return Some(Err(KernelError::Endless { head: self.head, limit: self.count }));
        }
        self.count += 1;
        self.steps += 1;
        if self.steps == self.until {
            (self.mark, self.steps, self.until) = (node, 0, self.until * 2);
        }
        match self.kernel.read_u64(node) {
            Ok(next) => self.next = next,
            Err(error) => {
                self.next = 0;
                self.error = Some(error);
            }
        }
        Some(Ok(node))
    }
}
