// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where the kernel has all physical memory in its own address space (`PAGE_OFFSET`,
//! arch/x86/include/asm/page_64_types.h).

use kvmmem_memory::paging::Levels;

use super::guest_kernel::Kernel;

/// The bases of kernels that do not choose one at random.
const FOUR_LEVELS: u64 = 0xffff_8880_0000_0000;
const FIVE_LEVELS: u64 = 0xff11_0000_0000_0000;

impl Kernel<'_> {
    /// The address of guest-physical address 0 in the direct map; `None` where it is not found, or
    /// the page tables disagree.
    pub fn direct_map(&self) -> Option<u64> {
        let default = if self.space.levels() == Levels::Four { FOUR_LEVELS } else { FIVE_LEVELS };
        let chosen = self.symbol("page_offset_base").and_then(|gva| self.read_u64(gva)).ok();
        // The page of the note is RAM, and the kernel has no reason to leave it out; nor that of
        // its outermost table.
        let page = self.note.gpa.unwrap_or_else(|| self.space.root().cr3);
        let is_it = |base: &u64| {
            let gva = base.checked_add(page);
            gva.and_then(|gva| self.space.translate(gva).ok())
                .is_some_and(|found| found.gpa == page)
        };
        chosen.into_iter().chain([default]).find(is_it)
    }
}
