// SPDX-License-Identifier: GPL-2.0-only
//! v1 file: the process that may map pages through an open file, and the account of its mappings.
//!
//! Opening costs a reference to the `mm_struct` only. The first MAP or UNMAP joins the process's
//! [`crate::process`], which registers an MMU notifier: that takes all locks of the process's
//! memory, and views never need it.

use kernel::fs::File;
use kernel::mm::{Mm, MmWithUser};
use kernel::prelude::*;
use kernel::sync::aref::ARef;
use kernel::sync::atomic::{Atomic, Relaxed};
use kernel::sync::{new_mutex, Mutex, SetOnce};
use kernel::transmute::AsBytes;
use kernel::uaccess::{UserPtr, UserSlice};

use crate::abi::ioctl::{MemMap, PAGE_SIZE};
use crate::hypercall::{self, Transport};
use crate::page::ForeignPage;
use crate::process::{Process, PROCESSES};
use crate::sys::notifier::MmRef;
use crate::sys::pin::is_user_page;
use crate::sys::secret::Secret;
use crate::table::ops::{self, Shared};
use crate::table::record::{ReserveError, UnmapError, Usage};
use crate::tree;
use crate::window_page::WindowPages;

/// The number of the account that is opened next; 64 bits do not run out.
static NEXT_OWNER: Atomic<i64> = Atomic::new(0);

/// A file's account in the table of its process. Dropping it undoes the file's mappings.
struct Account {
    process: MmRef<Process>,
    owner: u64,
}

impl Drop for Account {
    fn drop(&mut self) {
        ops::close(&*self.process, self.owner);
    }
}

/// The pages of an open file. They belong to the process that opened it.
#[pin_data]
pub(crate) struct PageFile {
    /// The opener's memory. The reference keeps another process's from getting the same address.
    mm: ARef<Mm>,
    account: SetOnce<Account>,
    windows: SetOnce<WindowPages>,
    /// Held while the account is opened, or `windows` are made.
    #[pin]
    joining: Mutex<()>,
}

impl PageFile {
    /// Without an account. `EINVAL` for a kernel thread.
    pub(crate) fn new() -> Result<impl PinInit<Self>> {
        let task = current!();
        let mm: &Mm = task.mm().ok_or(EINVAL)?;
        let mm = ARef::from(mm);
        Ok(pin_init!(Self {
            mm,
            account: SetOnce::new(),
            windows: SetOnce::new(),
            joining <- new_mutex!((), "kvmmem_joining"),
        }))
    }

    /// MAP of v1.
    pub(crate) fn map(&self, file: &File, arg: usize) -> Result {
        let has_windows = hypercall::transport() == Transport::Devices;
        if !has_windows {
            hypercall::method()?;
        }
        let task = current!();
        let mm = self.opener(task.mm())?;
        // In kernel memory, from which the host reads the token.
        let mut request = Secret::<MemMap>::zeroed()?;
        UserSlice::new(UserPtr::from_addr(arg), MemMap::SIZE)
            .reader()
            .read_slice(request.as_bytes_mut())?;
        let (gpa, gva) = (request.gpa, request.gva);
        if gpa % PAGE_SIZE != 0 || gva % PAGE_SIZE != 0 || !is_user_page(mm, gva) {
            return Err(EINVAL);
        }
        if has_windows {
            return self.windows()?.map(file, mm, &request);
        }
        let slot = tree::slot()?;
        let account = self.account()?;
        ops::map(&*account.process, slot, gva, account.owner, || {
            ForeignPage::new(mm, &request)
        })
    }

    /// UNMAP of v1, through any file of the process.
    pub(crate) fn unmap(&self, gva: usize) -> Result {
        let task = current!();
        let mm = self.opener(task.mm())?;
        if gva as u64 % PAGE_SIZE != 0 {
            return Err(EINVAL);
        }
        if hypercall::transport() == Transport::Devices {
            return self.windows()?.unmap(mm, gva);
        }
        Ok(ops::unmap(&*self.account()?.process, gva as u64)?)
    }

    /// What the file has mapped.
    pub(crate) fn usage(&self) -> Usage {
        self.account
            .as_ref()
            .and_then(|account| account.process.with(|table| table.usage(account.owner)))
            .unwrap_or(Usage {
                mapped: self.windows.as_ref().map_or(0, WindowPages::count),
                quarantined: 0,
                limit: crate::max_pages_per_file(),
            })
    }

    /// The caller's memory, if the caller is the process that opened the file and still runs the
    /// same program.
    fn opener<'a>(&self, caller: Option<&'a MmWithUser>) -> Result<&'a MmWithUser> {
        caller
            .filter(|mm| core::ptr::eq(mm.as_raw(), self.mm.as_raw()))
            .ok_or(EINVAL)
    }

    /// What the file has mapped of views, made by the first call.
    fn windows(&self) -> Result<&WindowPages> {
        if self.windows.as_ref().is_none() {
            let _one = self.joining.lock();
            if self.windows.as_ref().is_none() {
                self.windows.populate(WindowPages::new(self.mm.clone())?);
            }
        }
        self.windows.as_ref().ok_or(ENOMEM)
    }

    /// The file's account, opened by the first call. The caller is the opener.
    fn account(&self) -> Result<&Account> {
        if let Some(account) = self.account.as_ref() {
            return Ok(account);
        }
        let _one = self.joining.lock();
        if self.account.as_ref().is_none() {
            let slot = tree::slot()?;
            let process = PROCESSES.of_current()?;
            let owner = NEXT_OWNER.fetch_add(1, Relaxed).unsigned_abs();
            process.with(|table| table.open(slot, owner, crate::max_pages_per_file()));
            self.account.populate(Account { process, owner });
        }
        self.account.as_ref().ok_or(ENOMEM)
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
