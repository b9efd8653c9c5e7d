// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a VM's RAM is, for some time.

use kvmmem_proto::map::{MemoryMap, Region};

/// Where the RAM is, for some time.
#[derive(Debug)]
pub struct Layout {
    /// Grows with each change, also where the map stays as it is. A VM keeps its number from one
    /// registration to the next (`Ram::continue_from`) as long as its process lives and
    /// nothing has changed, and no other VM has it: so a tool that keeps the number can tell
    /// whether it is still the same memory. Views call it the *instance*.
    pub generation: u64,
    /// The memory map. Offsets in private RAM are addresses of the VMM's process.
    pub map: MemoryMap,
    /// Whether the RAM is private to the VMM: it can be copied and not mapped.
    pub is_private: bool,
}

impl Layout {
    /// The regions as others are told them, to whom the VMM's addresses are of no use.
    pub(crate) fn regions(&self) -> Vec<Region> {
        let told = |region: &Region| match self.is_private {
            true => Region { offset: region.gpa, ..*region },
            false => *region,
        };
        self.map.regions().iter().map(told).collect()
    }
}
