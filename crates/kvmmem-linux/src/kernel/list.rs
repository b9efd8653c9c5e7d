// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Linked lists of the kernel (`include/linux/list.h`): walked one node after the other, and ended where they form a loop.
//!
//! A list is the guest's, and changes while it is read. A walk stops at the head, and with an error at a pointer that is
//! none, once it has come back to a node, or once it has seen more nodes than a kernel has. So a damaged list is never
//! taken for a short one.

use super::{Kernel, KernelError};

/// The most nodes of a list. Linux has at most 4 million tasks (PID_MAX_LIMIT).
pub const MAX_NODES: usize = 1 << 22;

/// How often a node is looked for that is taken out of its list while it is read.
const TRIES: u32 = 3;

/// Where a `list_head` has the pointer to the node before.
const PREV: u64 = 8;

/// The nodes of a list: addresses of `list_head`. It ends after an error.
#[derive(Debug)]
pub struct List<'k> {
    kernel: &'k Kernel<'k>,
    head: u64,
    /// Subtracted from a node's address.
    offset: u64,
    place: Place,
    /// Where it was before the last node.
    before: Place,
}

/// Where a walk is.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// The place of the pointer to the next node.
    link: Option<u64>,
    /// Brent's algorithm: a node that was seen, and after how many more the present one takes its place.
    mark: u64,
    steps: usize,
    until: usize,
    count: usize,
}

impl<'m> Kernel<'m> {
    /// The nodes of the circular list whose head is at `head`, the head itself left out.
    pub fn list(&self, head: u64) -> List<'_> {
        let place = Place { link: Some(head), mark: 0, steps: 0, until: 1, count: 0 };
        List { kernel: self, head, offset: 0, place, before: place }
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

impl List<'_> {
    /// What `read` makes of the next structure, and whether it is torn; `None` at the end. A structure that is taken out of the
    /// list while it is read is left out: its memory may hold something else by then. One that is not in order however often
    /// it is read is torn.
    ///
    /// # Errors
    /// As the iterator's, and `read`'s.
    pub fn next_with<T>(
        &mut self,
        mut read: impl FnMut(u64) -> Result<T, KernelError>,
    ) -> Result<Option<(T, bool)>, KernelError> {
        let mut tries = 1;
        loop {
            let Some(gva) = self.next().transpose()? else { return Ok(None) };
            let item = read(gva);
            let is_linked = self.is_linked(gva.wrapping_add(self.offset));
            if is_linked || tries == TRIES {
                return item.map(|item| Some((item, !is_linked)));
            }
            tries += 1;
            self.place = self.before;
        }
    }

    /// Whether the node before this one leads to it. What cannot be read leads nowhere.
    fn is_linked(&self, node: u64) -> bool {
        let before = self.kernel.read_u64(node.wrapping_add(PREV));
        before.and_then(|before| self.kernel.read_u64(before)).is_ok_and(|next| next == node)
    }
}

impl Iterator for List<'_> {
    type Item = Result<u64, KernelError>;

    fn next(&mut self) -> Option<Self::Item> {
        self.before = self.place;
        let place = &mut self.place;
        let node = match self.kernel.read_u64(place.link.take()?) {
            Ok(node) => node,
            Err(error) => return Some(Err(error)),
        };
        if node == self.head {
            return None;
        }
        if node == 0 || node & 1 != 0 {
            return Some(Err(KernelError::Broken { head: self.head, next: node }));
        }
        if node == place.mark || place.count >= MAX_NODES {
            return Some(Err(KernelError::Endless { head: self.head, limit: place.count }));
        }
        place.count += 1;
        place.steps += 1;
        if place.steps == place.until {
            (place.mark, place.steps, place.until) = (node, 0, place.until * 2);
        }
        place.link = Some(node);
        Some(Ok(node.wrapping_sub(self.offset)))
    }
}
