// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest-physical addresses of this process's pages, from `/proc/self/pagemap` (kernel document
//! admin-guide/mm/pagemap.rst). Needs CAP_SYS_ADMIN, or every frame number reads as 0.

use std::fs::File;
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};
use kvmmem::{PAGE_SIZE, Page};

const PRESENT: u64 = 1 << 63;
const FRAME: u64 = (1 << 55) - 1;

/// The address of `page` as the machine has it.
pub(crate) fn gpa(pagemap: &File, page: &Page) -> Result<u64> {
    let mut entry = [0; 8];
    let index = page.address() / PAGE_SIZE;
    pagemap
        .read_exact_at(&mut entry, index as u64 * 8)
        .context("cannot read /proc/self/pagemap")?;
    let entry = u64::from_ne_bytes(entry);
    ensure!(
        entry & PRESENT != 0 && entry & FRAME != 0,
        "pagemap says {entry:#x}: not present, or not root"
    );
    Ok((entry & FRAME) * PAGE_SIZE as u64)
}
