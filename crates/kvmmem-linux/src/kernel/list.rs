// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Linked lists of the kernel (`include/linux/list.h`): walked one node after the other, and ended where they form a loop.
//!
//! A list is the guest's, and changes while it is read. A walk stops at the head, and with an error at a pointer that is
//! none, once it has come back to a node, or once it has seen more nodes than a kernel has. So a damaged list is never
//! taken for a short one.

use super::{Kernel, KernelError};

/// The most nodes of a list. Linux has at most 4 million tasks (PID_MAX_LIMIT).
pub const MAX_NODES: usize = 1 << 22;

/// The nodes of a list: addresses of `list_head`. It ends after an error.
#[derive(Debug)]
pub struct List<'k> {
    kernel: &'k Kernel<'k>,
    head: u64,
    /// The place of the pointer to the next node.
    link: Option<u64>,
    /// Subtracted from a node's address.
    offset: u64,
    /// Brent's algorithm: a node that was seen, and after how many more the present one takes its place.
    mark: u64,
    steps: usize,
    until: usize,
    count: usize,
}

impl<'m> Kernel<'m> {
    /// The nodes of the circular list whose head is at `head`, the head itself left out.
    pub fn list(&self, head: u64) -> List<'_> {
        List { kernel: self, head, link: Some(head), offset: 0, mark: 0, steps: 0, until: 1, count: 0 }
    }

    /// The structures in which the nodes of a list are the member `path`, for example `task_struct` by `tasks`.
    ///
    /// # Errors
    /// As [`Kernel::member`].
    pub fn list_of(&self, head: u64, structure: &str, path: &str) -> Result<List<'_>, KernelError> {
        let offset = self.offset(structure, path)?;
        Ok(List { offset, ..self.list(head) })
    }

    /// The address of the structure that has the member `path` at `gva` (`container_of`).
    ///
    /// # Errors
    /// As [`Kernel::member`].
    pub fn container_of(&self, gva: u64, structure: &str, path: &str) -> Result<u64, KernelError> {
        Ok(gva.wrapping_sub(self.offset(structure, path)?))
    }
}

impl Iterator for List<'_> {
    type Item = Result<u64, KernelError>;

    fn next(&mut self) -> Option<Self::Item> {
        let node = match self.kernel.read_u64(self.link.take()?) {
            Ok(node) => node,
            Err(error) => return Some(Err(error)),
        };
        if node == self.head {
            return None;
        }
        if node == 0 || node & 1 != 0 {
            return Some(Err(KernelError::Broken { head: self.head, next: node }));
        }
        if node == self.mark || self.count >= MAX_NODES {
            return Some(Err(KernelError::Endless { head: self.head, limit: self.count }));
        }
        self.count += 1;
        self.steps += 1;
        if self.steps == self.until {
            (self.mark, self.steps, self.until) = (node, 0, self.until * 2);
        }
        self.link = Some(node);
        Some(Ok(node.wrapping_sub(self.offset)))
    }
}
