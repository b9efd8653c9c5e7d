// SPDX-License-Identifier: GPL-2.0-only
//! The way to the host: which one CPUID offers, the request that it carries, what its answer means
//! to the tool.

use kernel::fmt;
use kernel::prelude::*;
use kernel::sync::atomic::{Acquire, Atomic, Full, Relaxed, Release};
use kernel::sync::SetOnce;
use kernel::time::delay::fsleep;
use kernel::time::Delta;
use kernel::uaccess::{UserPtr, UserSlice};

use crate::abi::cpuid::{
    FEATURE_DOORBELL, FEATURE_VMCALL, FEATURE_WINDOW, LEAF_FEATURES, LEAF_SIGNATURE,
    SIGNATURE_REGISTERS,
};
use crate::abi::errno::KvmError;
use crate::abi::ioctl::MemMap;
use crate::sys::GivenBack;
use crate::{knobs, stats, sys};

/// How a hypercall leaves the virtual machine.
#[derive(Clone, Copy)]
pub(crate) enum Way {
    /// The instruction `vmcall` (Intel) or `vmmcall` (AMD).
    Vmcall,
    /// A read from this I/O port.
    Doorbell(u16),
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vmcall => write!(f, "vmcall"),
            Self::Doorbell(port) => write!(f, "doorbell port {port:#x}"),
        }
    }
}

static WAY: SetOnce<Way> = SetOnce::new();

/// There where the host has given back what a kernel before this one had replaced.
static GIVEN_BACK: SetOnce<GivenBack> = SetOnce::new();

/// How the host shows a target's memory to views.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Showing {
    /// In a window that it opens when it is called.
    Windows,
    /// In PCI devices that it plugs in; it cannot be called.
    Devices,
    /// Not at all: it serves v1's hypercalls only.
    Nothing,
}

static SHOWING: SetOnce<Showing> = SetOnce::new();

/// The way chosen when the module was loaded: `EOPNOTSUPP` where the host cannot be called.
pub(crate) fn way() -> Result<Way> {
    WAY.copy().ok_or(EOPNOTSUPP)
}

/// How the host shows memory, as found when the module was loaded.
pub(crate) fn showing() -> Showing {
    SHOWING.copy().unwrap_or(Showing::Devices)
}

/// Chooses the way that CPUID offers, `vmcall` first. Where the host cannot be called there may be
/// devices: `ENODEV` without a PCI bus.
pub(crate) fn choose() -> Result {
    let offered = match knobs::way() {
        Some(way) => Some((way, 0)),
        None => offered()?,
    };
    let Some((way, features)) = offered else {
        SHOWING.populate(Showing::Devices);
        pr_info!("this host serves no hypercalls (v1); it may show views as PCI devices\n");
        return Ok(());
    };
    let has_window = knobs::has_windows() || features & FEATURE_WINDOW != 0;
    let (showing, what) = if has_window {
        (Showing::Windows, "v1 and views")
    } else {
        (Showing::Nothing, "v1 only, no views")
    };
    pr_info!("the host is called by {way} and offers {what}\n");
    WAY.populate(way);
    SHOWING.populate(showing);
    // A kernel before this one may have left pages replaced: started by kexec, this one takes them
    // for ordinary RAM.
    match GivenBack::keep_all(way).map_err(error) {
        Ok(given_back) => {
            GIVEN_BACK.populate(given_back);
        }
        // A host of version 0.1.0 does not know the call.
        Err(EOPNOTSUPP) => {}
        Err(answer) => {
            pr_warn!(
                "the host did not give back pages that were replaced before: {}\n",
                answer.to_errno()
            );
        }
    }
    Ok(())
}

/// Whether the machine is going down: no page is replaced any more.
static IS_CLOSED: Atomic<bool> = Atomic::new(false);

/// How many calls are replacing a page.
static REPLACING: Atomic<i64> = Atomic::new(0);

/// Lets a page be replaced as long as this lives.
pub(crate) struct Replacing(());

impl Replacing {
    /// `EAGAIN` once the machine is going down.
    pub(crate) fn begin() -> Result<Self> {
        // Either this call sees that the pages are closed, or the one who closes them sees this
        // call.
        REPLACING.fetch_add(1, Full);
        let this = Self(());
        if IS_CLOSED.load(Relaxed) {
            Err(EAGAIN)
        } else {
            Ok(this)
        }
    }
}

impl Drop for Replacing {
    fn drop(&mut self) {
        REPLACING.fetch_add(-1, Release);
    }
}

/// The machine is going down, or another kernel is about to be started in it, which would take
/// replaced pages for ordinary RAM and write into the target: has the host give back all of them,
/// also those whose undo it refused before.
pub(crate) fn close_pages() {
    const TRIES: u32 = 5000;
    let Ok(way) = way() else { return };
    IS_CLOSED.xchg(true, Full);
    // A call that waits for the host's broker takes up to 2 s.
    for _ in 0..TRIES {
        if REPLACING.load(Acquire) == 0 {
            break;
        }
        fsleep(Delta::from_millis(1));
    }
    let count = stats::MAPPED.value() + stats::QUARANTINED.value();
    let answer = match GIVEN_BACK.as_ref() {
        Some(given_back) => given_back.zero_all(),
        None => GivenBack::keep_all(way).map(drop),
    };
    match answer.map_err(error) {
        Ok(()) if count > 0 => pr_notice!("the host gave {count} pages back before the reboot\n"),
        Err(error) if count > 0 => {
            pr_err!(
                "{count} pages show targets' memory across the reboot: {}\n",
                error.to_errno()
            );
        }
        _ => {}
    }
}

/// The way, and the feature bits. `None` where there is a PCI bus only.
fn offered() -> Result<Option<(Way, u32)>> {
    let [_, signature @ ..] = sys::cpuid(LEAF_SIGNATURE);
    if signature != SIGNATURE_REGISTERS {
        if sys::has_pci_bus() {
            return Ok(None);
        }
        pr_err!(
            "this machine's host does not serve kvmmem: CPUID leaf {:#x} has no KVMMEMKVMMEM signature, and there is no PCI bus\n",
            LEAF_SIGNATURE
        );
        return Err(ENODEV);
    }
    let [features, port, ..] = sys::cpuid(LEAF_FEATURES);
    if features & FEATURE_VMCALL != 0 {
        return Ok(Some((Way::Vmcall, features)));
    }
    match u16::try_from(port) {
        Ok(port) if features & FEATURE_DOORBELL != 0 && port != 0 => {
            Ok(Some((Way::Doorbell(port), features)))
        }
        _ => {
            pr_err!(
                "the host offers neither vmcall nor a doorbell port (features {features:#x}, port {port:#x})\n"
            );
            Err(ENODEV)
        }
    }
}

/// A tool's MAP request, in kernel memory that the host reads the token from. Erased when dropped.
pub(crate) struct Request(KBox<[u8; MemMap::SIZE]>);

impl Request {
    /// Copies the request from the tool's memory: `EFAULT` where that cannot be read.
    pub(crate) fn read(from: UserPtr) -> Result<Self> {
        // A power-of-two size class: the token never straddles a page.
        let mut request = Self(KBox::new([0; MemMap::SIZE], GFP_KERNEL)?);
        UserSlice::new(from, MemMap::SIZE)
            .reader()
            .read_slice(&mut *request.0)?;
        Ok(request)
    }

    /// The target's GPA and the process's GVA.
    pub(crate) fn addresses(&self) -> (u64, u64) {
        MemMap::addresses(&self.0)
    }

    /// The bytes, of which the token is the first 32.
    pub(crate) fn bytes(&self) -> &[u8; MemMap::SIZE] {
        &self.0
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        sys::erase(&mut *self.0);
    }
}

/// The error that a tool gets for the host's `answer`, which is not 0. An answer that is no error
/// of KVM's becomes EIO.
pub(crate) fn error(answer: i64) -> Error {
    KvmError::from_result(answer).map_or(EIO, |error| Error::from_errno(-error.errno()))
}
