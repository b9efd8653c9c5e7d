// SPDX-License-Identifier: GPL-2.0-only
//! Attachment: the host's side of a view, a window opened by hypercall or plugged PCI slots.
//!
//! [`crate::view`] makes one at ATTACH. The host shows the target's memory until it is dropped.

use core::mem::offset_of;

use kernel::prelude::*;
use kernel::uaccess::UserSliceReader;

use crate::abi::descriptor::{COMPLAINT_INVALID, GENERATION_AT};
use crate::abi::hypercall::{AttachRequest, AttachResult};
use crate::abi::ioctl::PAGE_SIZE;
use crate::hypercall;
use crate::knobs;
use crate::slots::{self, Claim};
use crate::snapshot::{CheckError, PageCopy, Snapshot};
use crate::stats;
use crate::sys::call::Method;
use crate::sys::memory::Memory;
use crate::sys::secret::{sha256, Secret};
use crate::sys::task;
use crate::window::Extent;

/// A request to attach, in memory that the host reads it from. It holds the token.
pub(crate) struct AttachCall(Secret<{ AttachRequest::SIZE }>);

impl AttachCall {
    /// Takes the token, the next 32 bytes, from a tool's request: `EFAULT` where they cannot be
    /// read.
    pub(crate) fn read_token(from: &mut UserSliceReader) -> Result<Self> {
        const TOKEN: usize = offset_of!(AttachRequest, pid);
        let mut call = Self(Secret::zeroed()?);
        from.read_slice(call.0.split_at_mut(TOKEN).0)?;
        Ok(call)
    }

    /// Asks the host for the view, with these flags. The token is used.
    fn call(&mut self, flags: u32) -> Result<HypercallView> {
        let method = hypercall::method()?;
        let (pid, uid, comm) = task::caller();
        self.put(offset_of!(AttachRequest, pid), &pid.to_ne_bytes());
        self.put(offset_of!(AttachRequest, uid), &uid.to_ne_bytes());
        self.put(offset_of!(AttachRequest, comm), &comm);
        self.put(offset_of!(AttachRequest, flags), &flags.to_ne_bytes());
        // On the heap, because stacks may have no address that the host can translate by the page.
        let mut result = KBox::new(AttachResult::default(), GFP_KERNEL)?;
        method.attach(&self.0, &mut result).map_err(|answer| {
            stats::REFUSED.add_one();
            hypercall::error(answer)
        })?;
        let gpa = knobs::descriptor(&*self.0).unwrap_or(result.descriptor_gpa);
        match knobs::map_memory().and_then(|()| Memory::map(gpa, PAGE_SIZE)) {
            Ok(page) => Ok(HypercallView { method, page }),
            Err(error) => {
                // Names the view all the same, if the host believes itself.
                let _ = method.detach(gpa);
                Err(stats::lie_unless_memory(
                    error,
                    "the descriptor's page is no memory of a window",
                ))
            }
        }
    }

    /// SHA-256 of the token.
    fn digest(&self) -> [u8; 32] {
        sha256(self.0.split_at(offset_of!(AttachRequest, pid)).0)
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
}

/// The host's side of a view, by transport.
pub(crate) enum Attachment {
    /// Opened by a hypercall.
    Hypercall(HypercallView),
    /// Shown by PCI devices.
    Devices(Claim),
}

/// A view opened by hypercall. Closed when dropped.
pub(crate) struct HypercallView {
    method: Method,
    page: Memory,
}

impl Attachment {
    /// Asks the host to open the view of `call`, with these flags.
    pub(crate) fn open(call: &mut AttachCall, flags: u32) -> Result<Self> {
        call.call(flags).map(Self::Hypercall)
    }

    /// Claims the slot with the token of `call`: `ENOENT` if there is none.
    pub(crate) fn take(call: &AttachCall) -> Result<Self> {
        slots::claim(&call.digest()).map(Self::Devices)
    }

    /// Whether it was opened by a hypercall.
    pub(crate) fn is_hypercall(&self) -> bool {
        matches!(self, Self::Hypercall(_))
    }

    /// Where this machine sees the descriptor's page, by which a hypercall's view is named to the
    /// host. `None` where it was unplugged.
    pub(crate) fn gpa(&self) -> Option<u64> {
        match self {
            Self::Hypercall(view) => Some(view.page.start()),
            Self::Devices(claim) => claim.with_page(Memory::start),
        }
    }

    /// The generation that the page shows at this moment, odd while the host is changing it. `None`
    /// where the page or one of the windows was unplugged.
    pub(crate) fn generation(&self) -> Option<u64> {
        match self {
            Self::Hypercall(view) => Some(view.page.read_u64(GENERATION_AT)),
            Self::Devices(claim) => claim.with_page(|page| page.read_u64(GENERATION_AT)),
        }
    }

    /// What the page says. `EAGAIN` while the host is changing it, however long that takes: a host
    /// may be stopped in the midst of it. `EIO` where it says what cannot be, `ESTALE` where it
    /// was unplugged. Does not wait.
    pub(crate) fn read(&self) -> Result<Snapshot> {
        let copy = match self {
            Self::Hypercall(view) => PageCopy::of(&view.page)?,
            Self::Devices(claim) => claim.with_page(PageCopy::of).ok_or(ESTALE)??,
        };
        let copy = copy.ok_or(EAGAIN)?;
        let checked = match self {
            Self::Hypercall(_) => Snapshot::check_opened(&copy),
            Self::Devices(claim) => {
                Snapshot::check_plugged(&copy, |number| Some(claim.window(number)?.len))
            }
        };
        match checked.map_err(CheckError::lie) {
            Ok(snapshot) => snapshot.ok_or(EAGAIN),
            Err(error) => {
                self.complain(error);
                Err(error)
            }
        }
    }

    /// Where a window of `snapshot` is, if there is such a one.
    pub(crate) fn window(&self, snapshot: &Snapshot, number: u32) -> Option<Extent> {
        let descriptor = &snapshot.descriptor;
        match self {
            // The only one that a hypercall opens.
            Self::Hypercall(_) => (number == 0).then_some(Extent {
                start: descriptor.window_gpa,
                len: descriptor.window_len,
                bar: None,
            }),
            Self::Devices(claim) => claim.window(number),
        }
    }

    /// Tells the host that nothing of a generation before this one is used any more.
    pub(crate) fn followed(&self, generation: u64) {
        if let Self::Devices(claim) = self {
            claim.followed(generation);
        }
    }

    /// Reports to the host that this machine no longer uses the view.
    pub(crate) fn let_go(&self) {
        if let Self::Devices(claim) = self {
            claim.let_go();
        }
    }

    /// A view that was not opened for want of memory, or because the host was changing it: ATTACH
    /// may be tried again with the same token, where the host does not count its use.
    pub(crate) fn put_back(self) {
        if let Self::Devices(claim) = self {
            claim.put_back();
        }
    }

    fn complain(&self, error: Error) {
        if let (Self::Devices(claim), true) = (self, error == EIO) {
            claim.complain(COMPLAINT_INVALID);
        }
    }

    /// Asks the host for the next data (or hole: `what`) from `gpa` on. `None` where there is none,
    /// `EOPNOTSUPP` where the host does not know.
    pub(crate) fn seek(&self, gpa: u64, what: u64) -> Result<Option<u64>> {
        let Self::Hypercall(view) = self else {
            return Err(EOPNOTSUPP);
        };
        let mut found = KBox::new(gpa, GFP_KERNEL)?;
        match view
            .method
            .seek(view.page.start(), &mut found, what)
            .map_err(hypercall::error)
        {
            Ok(()) if *found >= gpa => Ok(Some(*found)),
            Ok(()) => {
                stats::lie("it found an address before the one to begin at");
                Err(EIO)
            }
            Err(error) if error == ENOENT => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Drop for HypercallView {
    fn drop(&mut self) {
        // Nothing of this machine's own is behind the window, so a refusal harms nobody here; but
        // the host still shows the target's memory there.
        if self.method.detach(self.page.start()).is_err() {
            stats::REFUSED.add_one();
            stats::VIEWS_QUARANTINED.add_one();
        }
    }
}
