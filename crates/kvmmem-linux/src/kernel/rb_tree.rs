// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Red-black trees of the kernel (`include/linux/rbtree.h`), in order.
//!
//! A tree is the guest's, and changes while it is read: a node that comes twice, and a tree that is
//! deeper or larger than any of a kernel's, is an error. Below a node that cannot be read nothing
//! is found.

use std::collections::HashSet;

use super::error::KernelError;
use super::guest_kernel::Kernel;

/// The deepest tree: one of 2^32 nodes.
const MAX_DEPTH: usize = 64;

impl Kernel<'_> {
    /// The nodes of the tree whose `struct rb_root` is at `root`, in order; at most `most`. With
    /// them, why there are not more, if some cannot be read.
    ///
    /// # Errors
    /// [`KernelError::Read`] of the root, or as [`Kernel::member`].
    pub fn rb_tree(
        &self,
        root: u64,
        most: usize,
    ) -> Result<(Vec<u64>, Option<KernelError>), KernelError> {
        let (left, right) =
            (self.offset("rb_node", "rb_left")?, self.offset("rb_node", "rb_right")?);
        let endless = |limit| KernelError::Endless { head: root, limit };
        let (mut nodes, mut lost) = (Vec::new(), None);
        let mut seen = HashSet::new();
        // Nodes whose left side is being walked.
        let mut path = Vec::new();
        let mut at = self.read_u64(root)?;
        loop {
            while at != 0 {
                if path.len() >= MAX_DEPTH || seen.len() >= most || !seen.insert(at) {
                    return Ok((nodes, Some(endless(seen.len()))));
                }
                match self.read_u64(at.wrapping_add(left)) {
                    Ok(below) => {
                        path.push(at);
                        at = below;
                    }
                    Err(error) => {
                        lost = Some(error);
                        break;
                    }
                }
            }
            let Some(node) = path.pop() else { return Ok((nodes, lost)) };
            nodes.push(node);
            at = self.read_u64(node.wrapping_add(right)).unwrap_or_else(|error| {
                lost = Some(error);
                0
            });
        }
    }
}
