// SPDX-License-Identifier: GPL-2.0-only
//! Hypercalls to the VMM, by the ABI of [`crate::abi::hypercall`].

use core::ffi::{c_long, c_ulong};

use kernel::fmt;

use super::cpu::cpuid;
use crate::abi::cpuid::{
    FEATURE_DOORBELL, FEATURE_INTERRUPT, FEATURE_VMCALL, LEAF_FEATURES, LEAF_SIGNATURE,
    SIGNATURE_REGISTERS,
};
use crate::abi::hypercall::{
    AttachRequest, AttachResult, ATTACH, DETACH, MEM_MAP, MEM_UNMAP, SEEK, UNMAP_ALL,
    UNMAP_ALL_KEEP, UNMAP_ALL_ZERO,
};
use crate::abi::ioctl::MapMemToken;

extern "C" {
    fn kvmmem_vmcall(nr: c_ulong, a0: c_ulong, a1: c_ulong, a2: c_ulong) -> c_long;
    fn kvmmem_doorbell(port: u16, nr: c_ulong, a0: c_ulong, a1: c_ulong, a2: c_ulong) -> c_long;
}

#[derive(Clone, Copy)]
enum Way {
    /// The instruction `vmcall` (Intel) or `vmmcall` (AMD).
    Vmcall,
    /// A read from this I/O port.
    Doorbell(u16),
}

/// How a hypercall leaves the virtual machine.
///
/// # Invariants
///
/// The host said in CPUID that it answers by this way, or the selftest said so in its place.
#[derive(Clone, Copy)]
pub(crate) struct Method(Way);

/// What CPUID says of hypercalls.
pub(crate) struct Offer {
    pub(crate) features: u32,
    pub(crate) port: u32,
    /// `vmcall` where there is a choice.
    pub(crate) method: Option<Method>,
    /// The interrupt of changed descriptors.
    pub(crate) gsi: Option<u32>,
}

impl Offer {
    /// `None` without kvmmem's signature.
    pub(crate) fn read() -> Option<Self> {
        let [_, signature @ ..] = cpuid(LEAF_SIGNATURE);
        if signature != SIGNATURE_REGISTERS {
            return None;
        }
        let [features, port, gsi, _] = cpuid(LEAF_FEATURES);
        let doorbell = u16::try_from(port)
            .ok()
            .filter(|port| features & FEATURE_DOORBELL != 0 && *port != 0);
        // INVARIANT: of the ways that the feature bits name.
        let method = if features & FEATURE_VMCALL != 0 {
            Some(Method(Way::Vmcall))
        } else {
            doorbell.map(|port| Method(Way::Doorbell(port)))
        };
        Some(Self {
            features,
            port,
            method,
            gsi: (features & FEATURE_INTERRUPT != 0).then_some(gsi),
        })
    }
}

impl Method {
    /// The way that the selftest's device answers by: this port, or `vmcall` without one.
    #[cfg(kvmmem_selftest)]
    pub(crate) fn forced(port: Option<u16>) -> Self {
        Self(port.map_or(Way::Vmcall, Way::Doorbell))
    }

    /// One hypercall. The host's error is an `Err`.
    ///
    /// # Safety
    ///
    /// The arguments must be what `nr` demands. MEM_MAP: the address of 32 readable bytes, and a
    /// page of this machine that stays pinned until MEM_UNMAP or UNMAP_ALL and on whose content no
    /// kernel code relies. MEM_UNMAP: such a page. UNMAP_ALL: no kernel code relies on the content
    /// of any replaced page, unless it is told to keep it. ATTACH: the addresses of a readable
    /// [`AttachRequest`] and of an [`AttachResult`] that nothing else uses. SEEK: as second
    /// argument the address of a `u64` that nothing else uses. DETACH has no condition: memory in
    /// windows is accessed by raw pointers only.
    pub(super) unsafe fn call(self, nr: u64, a0: u64, a1: u64, a2: u64) -> Result<(), i64> {
        let answer = match self.0 {
            // SAFETY: by the type's invariant the host answers by the ABI, and by the function's
            // contract the arguments are what it demands.
            Way::Vmcall => unsafe { kvmmem_vmcall(nr, a0, a1, a2) },
            // SAFETY: by the type's invariant the port is the host's, which answers by the ABI, and
            // by the function's contract the arguments are what that demands.
            Way::Doorbell(port) => unsafe { kvmmem_doorbell(port, nr, a0, a1, a2) },
        };
        match answer {
            0 => Ok(()),
            error => Err(error),
        }
    }

    /// Opens a view.
    pub(crate) fn attach(
        self,
        request: &AttachRequest,
        result: &mut AttachResult,
    ) -> Result<(), i64> {
        let result: *mut AttachResult = result;
        // SAFETY: both are borrowed during the call, the result exclusively, and any bytes make an
        // `AttachResult`.
        unsafe {
            self.call(
                ATTACH,
                core::ptr::from_ref(request) as u64,
                result as u64,
                0,
            )
        }
    }

    /// Closes the view whose descriptor page is at `descriptor_gpa`.
    pub(crate) fn detach(self, descriptor_gpa: u64) -> Result<(), i64> {
        // SAFETY: DETACH has no condition.
        unsafe { self.call(DETACH, descriptor_gpa, 0, 0) }
    }

    /// Looks for data or a hole of the target, from `gpa` on.
    pub(crate) fn seek(self, descriptor_gpa: u64, gpa: &mut u64, what: u64) -> Result<(), i64> {
        let gpa: *mut u64 = gpa;
        // SAFETY: the number is borrowed exclusively during the call, and any bytes make one.
        unsafe { self.call(SEEK, descriptor_gpa, gpa as u64, what) }
    }

    /// Restores the pages that a kernel before this one replaced; they keep their content.
    pub(crate) fn keep_all(self) -> Result<PagesRestored, i64> {
        // SAFETY: the pages keep their content, which is all that a kernel can rely on of RAM that
        // it takes for its own.
        unsafe { self.call(UNMAP_ALL, UNMAP_ALL_KEEP, 0, 0) }?;
        // INVARIANT: just restored, and only this module replaces pages of this kernel's.
        Ok(PagesRestored(self))
    }

    /// Replaces a pinned page by the target's page at `target_gpa`.
    ///
    /// # Safety
    ///
    /// No kernel code may rely on the content of the page at `gpa`, which must stay pinned until
    /// [`Self::unmap`] has restored it.
    pub(super) unsafe fn map(
        self,
        token: &MapMemToken,
        target_gpa: u64,
        gpa: u64,
    ) -> Result<(), i64> {
        let token = core::ptr::from_ref(token) as u64;
        // SAFETY: the token's 32 bytes are borrowed during the call; by the function's contract the
        // page is pinned and nothing relies on its content.
        unsafe { self.call(MEM_MAP, token, target_gpa, gpa) }
    }

    /// Restores a page that [`Self::map`] replaced. It holds zeros.
    ///
    /// # Safety
    ///
    /// [`Self::map`] must have replaced the page at `gpa`.
    pub(super) unsafe fn unmap(self, gpa: u64) -> Result<(), i64> {
        // SAFETY: by the contract of `map` nothing relies on the page's content.
        unsafe { self.call(MEM_UNMAP, gpa, 0, 0) }
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Way::Vmcall => write!(f, "vmcall"),
            Way::Doorbell(port) => write!(f, "doorbell port {port:#x}"),
        }
    }
}

/// Proof that the pages which an earlier kernel had replaced were restored.
///
/// # Invariants
///
/// All replaced pages of this machine are [`super::pin::ReplacedPage`]s.
pub(crate) struct PagesRestored(Method);

impl PagesRestored {
    /// Restores all replaced pages, which hold zeros then.
    pub(crate) fn zero_all(&self) -> Result<(), i64> {
        // SAFETY: by the type's invariant the replaced pages are this module's: user memory, pinned
        // or quarantined, on whose content no kernel code relies.
        unsafe { self.0.call(UNMAP_ALL, UNMAP_ALL_ZERO, 0, 0) }
    }
}
