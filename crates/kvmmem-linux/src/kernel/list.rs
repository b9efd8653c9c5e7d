// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Linked lists of the kernel (`include/linux/list.h`): walked one node after the other, and ended
//! where they form a loop.
//!
//! A list is the guest's, and changes while it is read. A walk stops at the head, and with an error
//! at an invalid pointer, once it has come back to a node, or once it has seen more nodes than a
//! kernel has. So a damaged list is never taken for a short one. [`List::next_with`] reads what
//! follows a damaged node from the list's other end.

use std::collections::HashSet;

use super::error::KernelError;
use super::guest_kernel::Kernel;

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
    /// For [`List::next_with`].
    damage: Damage,
}

/// State of a walk over a damaged list. Nodes are the addresses of their structures.
#[derive(Debug, Default)]
struct Damage {
    /// The nodes so far.
    seen: HashSet<u64>,
    /// The last of them; `None` at the head.
    last: Option<u64>,
    /// Whether that one could not be read, so that its pointers may be anything.
    is_last_lost: bool,
    /// The nodes after a damaged one, the last of the list first.
    rest: Option<Vec<u64>>,
}

/// Where a walk is.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// The place of the pointer to the next node.
    link: Option<u64>,
    /// Brent's algorithm: a node that was seen, and after how many more the present one takes its
    /// place.
    mark: u64,
    steps: usize,
    until: usize,
    count: usize,
}

impl<'m> Kernel<'m> {
    /// The nodes of the circular list whose head is at `head`, the head itself left out.
    pub fn list(&self, head: u64) -> List<'_> {
        let place = Place { link: Some(head), mark: 0, steps: 0, until: 1, count: 0 };
        List { kernel: self, head, offset: 0, place, before: place, damage: Damage::default() }
    }

    /// The structures in which the nodes of a list are the member `path`, for example `task_struct`
    /// by `tasks`.
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
    /// What `read` makes of the next structure, and whether it is torn; `None` at the end. A
    /// structure that is taken out of the list while it is read is left out: its memory may
    /// hold something else by then. One that is not in order however often it is read is torn.
    ///
    /// # Errors
    /// As the iterator's, and `read`'s: each stands for one structure, or for all between two
    /// damaged ones. The next call reads what follows.
    pub fn next_with<T>(
        &mut self,
        mut read: impl FnMut(u64) -> Result<T, KernelError>,
    ) -> Result<Option<(T, bool)>, KernelError> {
        let mut tries = 1;
        loop {
            let Some(gva) = self.next_node()? else { return Ok(None) };
            let item = read(gva);
            let is_linked = self.is_linked(gva.wrapping_add(self.offset));
            if !is_linked && tries < TRIES && self.damage.rest.is_none() {
                tries += 1;
                self.place = self.before;
                self.damage.seen.remove(&gva);
                continue;
            }
            let is_lost = item.is_err() && !is_linked;
            if let (Err(error), true) = (&item, is_lost && self.damage.is_last_lost)
                && error.is_local()
                && self.damage.rest.is_none()
            {
                // The damaged node before it leads here: this is not a node.
                self.damage.seen.remove(&gva);
                self.recover(KernelError::Broken {
                    head: self.head,
                    next: gva.wrapping_add(self.offset),
                })?;
                continue;
            }
            self.damage.last = Some(gva);
            self.damage.is_last_lost = is_lost;
            return item.map(|item| Some((item, !is_linked)));
        }
    }

    /// The next node: of the list, or of the rest that its other end leads to.
    fn next_node(&mut self) -> Result<Option<u64>, KernelError> {
        loop {
            if let Some(rest) = &mut self.damage.rest {
                return Ok(rest.pop());
            }
            let error = match self.next().transpose() {
                Ok(None) => return Ok(None),
                Ok(Some(gva)) if self.damage.seen.insert(gva) => return Ok(Some(gva)),
                Ok(Some(_)) => {
                    KernelError::Endless { head: self.head, limit: self.damage.seen.len() }
                }
                Err(error) => error,
            };
            self.recover(error)?;
        }
    }

    /// Looks up what follows the last node from the list's other end.
    ///
    /// # Errors
    /// `error`, the reason why the last node leads nowhere, unless that end leads back to it.
    fn recover(&mut self, error: KernelError) -> Result<(), KernelError> {
        let mut rest = Vec::new();
        let mut at = self.head;
        let is_whole = error.is_local()
            && loop {
                let Ok(node) = self.kernel.read_u64(at.wrapping_add(PREV)) else { break false };
                let gva = node.wrapping_sub(self.offset);
                if node == self.head {
                    break self.damage.last.is_none();
                }
                if node == 0 || node & 1 != 0 || rest.len() >= MAX_NODES {
                    break false;
                }
                if self.damage.seen.contains(&gva) {
                    break self.damage.last == Some(gva);
                }
                // A structure that does not lead back is not a node. The damage begins at the first
                // one that cannot be read.
                if self.kernel.read_u64(node).is_ok_and(|next| next != at) {
                    break false;
                }
                self.damage.seen.insert(gva);
                rest.push(gva);
                at = node;
            };
        self.damage.rest = Some(rest);
        if is_whole { Ok(()) } else { Err(error) }
    }

    /// Whether a node beside this one leads to it. What cannot be read leads nowhere.
    fn is_linked(&self, node: u64) -> bool {
        let leads = |beside: u64, back: u64| {
            let beside = self.kernel.read_u64(node.wrapping_add(beside));
            let back = beside.and_then(|beside| self.kernel.read_u64(beside.wrapping_add(back)));
            back.is_ok_and(|back| back == node)
        };
        leads(PREV, 0) || leads(0, PREV)
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
