// SPDX-License-Identifier: GPL-2.0-only
//! Attachment: the host's side of a view, a window opened by hypercall or plugged PCI slots.
//!
//! [`crate::view`] makes one at ATTACH. The host shows the target's memory until it is dropped.

use kernel::prelude::*;
use kernel::transmute::AsBytes;
use kernel::uaccess::UserSliceReader;

use crate::abi::descriptor::{COMPLAINT_INVALID, GENERATION_AT};
use crate::abi::hypercall::{AttachRequest, AttachResult};
use crate::abi::ioctl::PAGE_SIZE;
use crate::hypercall::{self, Transport};
use crate::knobs;
use crate::slots::{self, Claim, ListedToken};
use crate::snapshot::{CheckError, PageCopy, Snapshot};
use crate::stats;
use crate::sys::call::Method;
use crate::sys::memory::Memory;
use crate::sys::secret::{sha256, Secret};
use crate::sys::task;
use crate::window::Extent;

/// A request to attach, in memory that the host reads it from. It holds the token.
pub(crate) struct AttachCall(Secret<AttachRequest>);

impl AttachCall {
    /// Takes the token, the next 32 bytes, from a tool's request: `EFAULT` where they cannot be
    /// read.
    pub(crate) fn read_token(from: &mut UserSliceReader) -> Result<Self> {
        let mut call = Self(Secret::zeroed()?);
        from.read_slice(AsBytes::as_bytes_mut(&mut call.0.token))?;
        Ok(call)
    }

    /// Asks the host for the view, with these flags. The token is used.
    fn call(&mut self, flags: u32) -> Result<HypercallView> {
        let method = hypercall::method()?;
        (self.0.pid, self.0.uid, self.0.comm) = task::caller();
        self.0.flags = flags;
        // On the heap, because stacks may have no address that the host can translate by the page.
        let mut result = KBox::new(AttachResult::default(), GFP_KERNEL)?;
        method.attach(&self.0, &mut result).map_err(|answer| {
            stats::REFUSED.add_one();
            hypercall::error(answer)
        })?;
        let gpa = knobs::descriptor(self.0.as_bytes()).unwrap_or(result.descriptor_gpa);
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
        sha256(AsBytes::as_bytes(&self.0.token))
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
    /// Asks the host to open the view of `call`, or takes its slot: `ENOENT` if there is none.
    /// `EOPNOTSUPP` where the host offers no views.
    pub(crate) fn open(mut call: AttachCall, flags: u32) -> Result<Self> {
        match hypercall::transport() {
            Transport::Windows => call.call(flags).map(Self::Hypercall),
            Transport::Devices => Self::take(&call.digest()),
            Transport::None => Err(EOPNOTSUPP),
        }
    }

    /// Claims the slot whose ticket has this SHA-256, or shares the one that lists it as a token:
    /// `ENOENT` if there is none.
    fn take(digest: &[u8; 32]) -> Result<Self> {
        match slots::claim(digest) {
            Err(ENOENT) => {}
            claimed => return claimed.map(Self::Devices),
        }
        let token = slots::find_token(digest)?;
        let claim = token.share()?;
        token.use_once()?;
        Ok(Self::Devices(claim))
    }

    /// Whether it is by the slot that lists a token.
    pub(crate) fn lists(&self, token: &ListedToken) -> bool {
        self.claim().is_some_and(|claim| token.is_of(claim))
    }

    /// Uses the descriptor's page. `None` where it or one of the windows was unplugged.
    fn with_page<R>(&self, use_it: impl FnOnce(&Memory) -> R) -> Option<R> {
        match self {
            Self::Hypercall(view) => Some(use_it(&view.page)),
            Self::Devices(claim) => claim.with_page(use_it),
        }
    }

    /// Where this machine sees the descriptor's page, by which a hypercall's view is named to the
    /// host.
    pub(crate) fn gpa(&self) -> Option<u64> {
        self.with_page(Memory::start)
    }

    /// The generation that the page shows at this moment, odd while the host is changing it.
    pub(crate) fn generation(&self) -> Option<u64> {
        self.with_page(|page| page.read_u64(GENERATION_AT))
    }

    /// What the page says. `EAGAIN` while the host is changing it, however long that takes: a host
    /// may be stopped in the midst of it. `EIO` where it says what cannot be, `ESTALE` where it
    /// was unplugged. Does not wait.
    pub(crate) fn read(&self) -> Result<Snapshot> {
        let copy = self.with_page(PageCopy::of).ok_or(ESTALE)??;
        let Some(claim) = self.claim() else {
            return Snapshot::check_opened(&copy).map_err(CheckError::report);
        };
        Snapshot::check_plugged(&copy, |number| Some(claim.window(number)?.len))
            .map_err(CheckError::report)
            .inspect_err(|error| {
                if *error == EIO {
                    claim.complain(COMPLAINT_INVALID);
                }
            })
    }

    /// The slot, where the view is shown by devices.
    pub(crate) fn claim(&self) -> Option<&Claim> {
        match self {
            Self::Hypercall(_) => None,
            Self::Devices(claim) => Some(claim),
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

    /// A view that was not opened for want of memory, or because the host was changing it: ATTACH
    /// may be tried again with the same token, where the host does not count its use.
    pub(crate) fn put_back(self) {
        if let Self::Devices(claim) = self {
            claim.put_back();
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
        // A refusal does no harm here, as the window holds none of this machine's memory; but the
        // host still shows the target's there.
        if self.method.detach(self.page.start()).is_err() {
            stats::REFUSED.add_one();
            stats::VIEWS_QUARANTINED.add_one();
        }
    }
}
