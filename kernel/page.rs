// SPDX-License-Identifier: GPL-2.0-only
//! Page of the tool that v1 replaces: checked, charged and pinned until the replacement is undone.

use kernel::mm::virt::{flags, VmaRef};
use kernel::mm::MmWithUser;
use kernel::prelude::*;

use crate::abi::ioctl::MemMap;
use crate::hypercall;
use crate::power::UseGuard;
use crate::stats;
use crate::sys::pin::{is_anonymous, PinnedPage, ReplacedPage};
use crate::table::ops::Page;

/// A page that shows a target's memory.
pub(crate) struct ForeignPage {
    page: ReplacedPage,
    is_quarantined: bool,
}

impl ForeignPage {
    /// Replaces a page of the calling process as `request` asks for.
    pub(crate) fn new(mm: &MmWithUser, request: &MemMap) -> Result<Self> {
        let gva = request.gva as usize;
        check_memory(mm, gva)?;
        let page = PinnedPage::pin(mm, gva)?;
        // The memory may have changed hands since it was looked at: what counts is the page that
        // was pinned.
        if !page.is_anonymous() {
            return Err(EINVAL);
        }
        let _beginning = UseGuard::begin()?;
        let page = page
            .replace(hypercall::method()?, &request.token, request.gpa)
            .map_err(|answer| {
                stats::REFUSED.add_one();
                hypercall::error(answer)
            })?;
        stats::TOTAL.add_one();
        stats::MAPPED.add_one();
        Ok(Self {
            page,
            is_quarantined: false,
        })
    }
}

impl Page for ForeignPage {
    fn undo(self) -> Result<(), Self> {
        let Self {
            page,
            is_quarantined,
        } = self;
        let counter = if is_quarantined {
            &stats::QUARANTINED
        } else {
            &stats::MAPPED
        };
        let restored = match hypercall::method() {
            Ok(method) => page.restore(method),
            Err(_) => Err(page),
        };
        match restored {
            Ok(pinned) => {
                counter.subtract_one();
                drop(pinned);
                Ok(())
            }
            Err(page) => {
                stats::REFUSED.add_one();
                if !is_quarantined {
                    stats::MAPPED.subtract_one();
                    stats::QUARANTINED.add_one();
                }
                Err(Self {
                    page,
                    is_quarantined: true,
                })
            }
        }
    }
}

/// Whether the memory at `gva` is the process's own: private, anonymous, writable, in ordinary
/// pages. `EFAULT` where there is none.
pub(crate) fn check_memory(mm: &MmWithUser, gva: usize) -> Result {
    let lock = mm.mmap_read_lock();
    let vma = lock.vma_lookup(gva).ok_or(EFAULT)?;
    if is_suitable(vma) {
        Ok(())
    } else {
        Err(EINVAL)
    }
}

fn is_suitable(vma: &VmaRef) -> bool {
    let unsuitable = flags::SHARED
        | flags::MAYSHARE
        | flags::HUGETLB
        | flags::PFNMAP
        | flags::MIXEDMAP
        | flags::IO;
    vma.flags() & unsuitable == 0 && vma.flags() & flags::WRITE != 0 && is_anonymous(vma)
}
