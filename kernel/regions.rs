// SPDX-License-Identifier: GPL-2.0-only
//! Region ioctls of libkvmi ([`crate::abi::region`]).
//!
//! A file opened for a target has a view while at least one of its regions is mapped; a region is a
//! range of that view.

use core::mem::offset_of;

use kernel::fs::File;
use kernel::prelude::*;
use kernel::uaccess::{UserPtr, UserSlice};

use crate::abi::native::Range;
use crate::abi::region::Region;
use crate::attachment::AttachCall;
use crate::file::ViewFile;
use crate::power::UseGuard;
use crate::view::Contents;

type Uuid = [u8; 16];

/// A region that MAP returned, and how many areas of memory show it.
struct MappedRegion {
    range: Range,
    areas: usize,
}

impl MappedRegion {
    fn holds(&self, gpa: u64, len: u64) -> bool {
        gpa.checked_sub(self.range.gpa)
            .and_then(|offset| offset.checked_add(len))
            .is_some_and(|end| end <= self.range.len)
    }
}

/// The regions of a file, if it was opened for a target.
#[derive(Default)]
pub(crate) struct Regions {
    target: Option<Uuid>,
    mapped: KVec<MappedRegion>,
}

impl Regions {
    pub(crate) fn is_open(&self) -> bool {
        self.target.is_some()
    }

    /// The view is gone, and its areas show nothing any more.
    pub(crate) fn forget(&mut self) {
        self.mapped.clear();
    }

    /// A new area: `EINVAL` where it is not within one mapped region. Any, where the file has no
    /// regions.
    pub(crate) fn add_area(&mut self, gpa: u64, len: u64) -> Result {
        if !self.is_open() {
            return Ok(());
        }
        self.find(gpa, len).ok_or(EINVAL)?.areas += 1;
        Ok(())
    }

    pub(crate) fn remove_area(&mut self, gpa: u64) {
        if let Some(mapped) = self.find(gpa, 0) {
            mapped.areas = mapped.areas.saturating_sub(1);
        }
    }

    fn find(&mut self, gpa: u64, len: u64) -> Option<&mut MappedRegion> {
        self.mapped
            .iter_mut()
            .find(|mapped| mapped.holds(gpa, len) && gpa < mapped.range.gpa + mapped.range.len)
    }

    /// Removes the region that begins at `gpa`: `EINVAL` where none does or areas show it. Whether
    /// none is left.
    fn remove(&mut self, gpa: u64) -> Result<bool> {
        let index = self
            .mapped
            .iter()
            .position(|mapped| mapped.range.gpa == gpa)
            .ok_or(EINVAL)?;
        if self.mapped.get(index).is_none_or(|mapped| mapped.areas > 0) {
            return Err(EINVAL);
        }
        self.mapped.remove(index).map_err(|_| EINVAL)?;
        Ok(self.mapped.is_empty())
    }
}

impl ViewFile {
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
        if self.has_view() {
            return Err(EISCONN);
        }
        regions.target = Some(uuid);
        Ok(())
    }

    /// MAP: the region that holds an address. `EALREADY` where it is mapped, `ENOENT` where the
    /// token is another target's, `ENXIO` where the address is in none, `EINVAL` before OPEN.
    pub(crate) fn region_map(&self, file: &File, at: UserPtr) -> Result {
        let mut reader = UserSlice::new(at, size_of::<Region>()).reader();
        let call = AttachCall::read_token(&mut reader)?;
        let gpa = reader.read::<u64>()?;
        let range = self.add_region(file, call, gpa)?;
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

    fn add_region(&self, file: &File, call: AttachCall, gpa: u64) -> Result<Range> {
        let _one = self.attaching.lock();
        let target = {
            let mut regions = self.regions.lock();
            if regions.find(gpa, 0).is_some() {
                return Err(EALREADY);
            }
            regions.mapped.reserve(1, GFP_KERNEL_ACCOUNT)?;
            regions.target.ok_or(EINVAL)?
        };
        // Each region has a token of its own. It is spent by attaching, though the file keeps its
        // first view.
        let _beginning = UseGuard::begin()?;
        let asked = self.open_view(file, call, 0)?;
        let range = region(&asked.contents(), &target, gpa)?;
        match self.view() {
            Ok(view) => {
                let own = region(&view.look(), &target, gpa)?;
                if own != range {
                    return Err(ENXIO);
                }
            }
            Err(_) => self.set_view(asked),
        }
        self.regions
            .lock()
            .mapped
            .push(MappedRegion { range, areas: 0 }, GFP_KERNEL_ACCOUNT)?;
        Ok(range)
    }

    /// UNMAP: the region that begins at `gpa`. `EINVAL` where none does or it is still mapped into
    /// memory. Before OPEN the address 0 asks whether there are regions: yes.
    pub(crate) fn region_unmap(&self, gpa: u64) -> Result {
        let _one = self.attaching.lock();
        {
            let mut regions = self.regions.lock();
            if !regions.is_open() && gpa == 0 {
                return Ok(());
            }
            if !regions.remove(gpa)? {
                return Ok(());
            }
        }
        self.detach()
    }
}

/// The range of a view of `target` that holds `gpa`.
fn region(contents: &Contents, target: &Uuid, gpa: u64) -> Result<Range> {
    let window = contents
        .window
        .as_ref()
        .map_err(|ended| Error::from(*ended))?;
    if contents.uuid != *target {
        return Err(ENOENT);
    }
    window
        .ranges()
        .find(|range| {
            gpa.checked_sub(range.gpa)
                .is_some_and(|offset| offset < range.len)
        })
        .ok_or(ENXIO)
}
