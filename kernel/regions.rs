// SPDX-License-Identifier: GPL-2.0-only
//! Region ioctls of libkvmi ([`crate::abi::region`]).
//!
//! A file opened for a target has a view while at least one of its regions is mapped; a region is a
//! range of that view.

use core::mem::offset_of;

use kernel::mm::virt::VmaNew;
use kernel::prelude::*;
use kernel::sync::Arc;
use kernel::uaccess::{UserPtr, UserSlice};

use crate::abi::native::Range;
use crate::abi::region::Region;
use crate::attachment::AttachCall;
use crate::contents::Contents;
use crate::power::UseGuard;
use crate::view::View;

type Uuid = [u8; 16];

/// The regions of a file, if it was opened for a target.
#[derive(Default)]
pub(crate) struct Regions {
    target: Option<Uuid>,
    /// Those that MAP returned.
    mapped: KVec<Range>,
}

impl Regions {
    pub(crate) fn is_open(&self) -> bool {
        self.target.is_some()
    }

    /// The view is gone.
    pub(crate) fn forget(&mut self) {
        self.mapped.clear();
    }

    /// A new area: `EINVAL` where it is not within one mapped region. Any, where the file has no
    /// regions.
    pub(crate) fn admit(&self, area: &VmaNew, gpa: u64, len: u64) -> Result {
        if !self.is_open() {
            return Ok(());
        }
        // As in the driver that defined these calls.
        area.set_dontcopy();
        let region = self.find(gpa).ok_or(EINVAL)?;
        if len > region.len - (gpa - region.gpa) {
            return Err(EINVAL);
        }
        Ok(())
    }

    fn find(&self, gpa: u64) -> Option<&Range> {
        self.mapped.iter().find(|range| holds(range, gpa))
    }
}

fn holds(range: &Range, gpa: u64) -> bool {
    gpa.checked_sub(range.gpa)
        .is_some_and(|offset| offset < range.len)
}

impl View {
    /// OPEN: `EALREADY` the second time, `EISCONN` where the file has a view.
    pub(crate) fn region_open(&self, from: UserPtr) -> Result {
        let uuid = UserSlice::new(from, size_of::<Uuid>())
            .reader()
            .read::<Uuid>()?;
        let _one = self.attaching.lock();
        let mut regions = self.regions.lock();
        if regions.is_open() {
            return Err(EALREADY);
        }
        if self.contents().session().is_ok() {
            return Err(EISCONN);
        }
        regions.target = Some(uuid);
        Ok(())
    }

    /// MAP: the region that holds an address. `EALREADY` where it is mapped, `ENOENT` where the
    /// token is another target's, `ENXIO` where the address is in none, `EINVAL` before OPEN.
    pub(crate) fn region_map(self: &Arc<Self>, at: UserPtr) -> Result {
        let mut reader = UserSlice::new(at, size_of::<Region>()).reader();
        let call = AttachCall::read_token(&mut reader)?;
        let gpa = reader.read::<u64>()?;
        let range = self.add_region(call, gpa)?;
        let result = UserPtr::wrapping_byte_add(at, offset_of!(Region, gpa));
        UserSlice::new(result, size_of::<Range>())
            .writer()
            .write(&range)
            .inspect_err(|_| {
                // The tool does not know that it has the region. Another thread that mapped it
                // meanwhile keeps it.
                let _ = self.region_unmap(range.gpa);
            })
    }

    fn add_region(self: &Arc<Self>, call: AttachCall, gpa: u64) -> Result<Range> {
        let _one = self.attaching.lock();
        let target = {
            let mut regions = self.regions.lock();
            if regions.find(gpa).is_some() {
                return Err(EALREADY);
            }
            regions.mapped.reserve(1, GFP_KERNEL_ACCOUNT)?;
            regions.target.ok_or(EINVAL)?
        };
        // Each region has a token of its own. It is spent by attaching, though the file keeps its
        // first view.
        let _beginning = UseGuard::begin()?;
        let asked = Contents::open(call, 0)?;
        let range = region(&asked, &target, gpa)?;
        if self.contents().session().is_err() {
            self.set(asked);
        } else if region(&self.look(), &target, gpa)? != range {
            return Err(ENXIO);
        }
        self.regions.lock().mapped.push(range, GFP_KERNEL_ACCOUNT)?;
        Ok(range)
    }

    /// UNMAP: the region that begins at `gpa`. `EINVAL` where none does. Before OPEN the address 0
    /// asks whether there are regions: yes. Memory that shows the region keeps it while the file
    /// has others; the last UNMAP closes the view.
    pub(crate) fn region_unmap(&self, gpa: u64) -> Result {
        let _one = self.attaching.lock();
        let is_last = {
            let regions = self.regions.lock();
            if !regions.is_open() && gpa == 0 {
                return Ok(());
            }
            if regions.mapped.iter().all(|range| range.gpa != gpa) {
                return Err(EINVAL);
            }
            regions.mapped.len() == 1
        };
        // Before: where it fails, UNMAP may be called again.
        if is_last {
            self.detach()?;
        }
        self.regions.lock().mapped.retain(|range| range.gpa != gpa);
        Ok(())
    }
}

/// The range of a view of `target` that holds `gpa`.
fn region(contents: &Contents, target: &Uuid, gpa: u64) -> Result<Range> {
    let window = contents.window()?;
    if contents.descriptor.uuid != *target {
        return Err(ENOENT);
    }
    window.ranges().find(|range| holds(range, gpa)).ok_or(ENXIO)
}
