// SPDX-License-Identifier: GPL-2.0-only
//! `/dev/kvmmem`: open, ioctl, fdinfo, release.

use kernel::fs::File;
use kernel::miscdevice::{MiscDevice, MiscDeviceRegistration};
use kernel::mm::MmWithUser;
use kernel::prelude::*;
use kernel::seq_file::{SeqFile, seq_print};
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::uaccess::UserPtr;

use crate::abi::ioctl::{MEM_MAP, MEM_UNMAP, PAGE_SIZE};
use crate::hypercall::Request;
use crate::page::ForeignPage;
use crate::sys::ProcessRef;
use crate::table::ops::{self, Shared};
use crate::table::record::{ReserveError, UnmapError};
use crate::tree;

/// The number of the file that is opened next; 64 bits do not run out.
static NEXT_OWNER: Atomic<i64> = Atomic::new(0);

/// One open file of the device, bound to the process that opened it.
pub(crate) struct OpenFile {
    process: ProcessRef,
    owner: u64,
}

#[vtable]
impl MiscDevice for OpenFile {
    type Ptr = KBox<Self>;

    fn open(_file: &File, _device: &MiscDeviceRegistration<Self>) -> Result<KBox<Self>> {
        let slot = tree::slot()?;
        let process = ProcessRef::of_current()?;
        let owner = NEXT_OWNER.fetch_add(1, Relaxed).unsigned_abs();
        process.with(|table| table.open(slot, owner, crate::max_pages_per_file()));
        // From here on dropping the file closes its account.
        let file = Self { process, owner };
        Ok(KBox::new(file, GFP_KERNEL_ACCOUNT)?)
    }

    fn ioctl(this: &Self, _file: &File, cmd: u32, arg: usize) -> Result<isize> {
        match cmd {
            MEM_MAP => this.map(arg)?,
            MEM_UNMAP => this.unmap(arg)?,
            _ => return Err(ENOTTY),
        }
        Ok(0)
    }

    fn show_fdinfo(this: &Self, m: &SeqFile, _file: &File) {
        if let Some(usage) = this.process.with(|table| table.usage(this.owner)) {
            seq_print!(m, "kvmmem-mapped:\t{}\n", usage.mapped);
            seq_print!(m, "kvmmem-quarantined:\t{}\n", usage.quarantined);
            seq_print!(m, "kvmmem-limit:\t{}\n", usage.limit);
        }
    }
}

impl OpenFile {
    fn map(&self, arg: usize) -> Result {
        let task = current!();
        let mm = self.opener(task.mm())?;
        let request = Request::read(UserPtr::from_addr(arg))?;
        let (gpa, gva) = request.addresses();
        if gpa % PAGE_SIZE != 0 || gva % PAGE_SIZE != 0 {
            return Err(EINVAL);
        }
        let slot = tree::slot()?;
        ops::map(&*self.process, slot, gva, self.owner, || ForeignPage::new(mm, gva as usize, &request))
    }

    fn unmap(&self, gva: usize) -> Result {
        let task = current!();
        self.opener(task.mm())?;
        if gva as u64 % PAGE_SIZE != 0 {
            return Err(EINVAL);
        }
        Ok(ops::unmap(&*self.process, gva as u64)?)
    }

    /// The caller's memory, if the caller is the process that opened the file and still runs the same program.
    fn opener<'a>(&self, caller: Option<&'a MmWithUser>) -> Result<&'a MmWithUser> {
        caller.filter(|mm| self.process.is(mm)).ok_or(EINVAL)
    }
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        ops::close(&*self.process, self.owner);
    }
}

impl From<ReserveError> for Error {
    fn from(error: ReserveError) -> Self {
        match error {
            ReserveError::InUse => EALREADY,
            ReserveError::OverLimit => ENOMEM,
            ReserveError::Closed => EINVAL,
        }
    }
}

impl From<UnmapError> for Error {
    fn from(error: UnmapError) -> Self {
        match error {
            UnmapError::NotMapped => ENOENT,
            UnmapError::Busy => EALREADY,
            UnmapError::Refused => EIO,
        }
    }
}
