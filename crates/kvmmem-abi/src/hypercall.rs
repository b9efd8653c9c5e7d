// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hypercalls from the introspector's kernel to its VMM.
//!
//! By `vmcall`/`vmmcall`: rax = number, rbx, rcx, rdx, rsi = a0 to a3, rdi = 0 (Xen's number 32 is
//! `event_channel_op`, and KVM answers some of its forms, chosen by rdi, in the kernel); the result
//! comes back in rax.
//!
//! By the doorbell port: `in eax, dx` with dx = the port, rax = number, rbx, rcx, rdi, rsi = a0 to
//! a3 (rdi stands in for rdx, which the instruction needs); the result comes back in eax.
//!
//! A result is 0 or the negative of a number in [`crate::errno::KvmError`]. Only CPL 0 may call.

/// `KVM_HC_MEM_MAP`: a0 = guest-virtual address of the 32-byte token, a1 = GPA in the target, a2 =
/// own GPA to replace.
pub const MEM_MAP: u64 = 32;

/// `KVM_HC_MEM_UNMAP`: a0 = own GPA, which becomes a fresh zero page.
pub const MEM_UNMAP: u64 = 33;

/// `KVM_HC_VIEW_ATTACH`: a0 = guest-virtual address of an [`AttachRequest`], a1 = guest-virtual
/// address of the [`AttachResult`] that the host fills in. Opens a view: from then on the
/// descriptor page ([`crate::descriptor`]) tells where in the window the target's ranges are.
pub const ATTACH: u64 = 40;

/// `KVM_HC_VIEW_DETACH`: a0 = GPA of the descriptor page. Closes the view; its part of the window
/// is gone on return.
pub const DETACH: u64 = 41;

/// `KVM_HC_VIEW_SEEK`: a0 = GPA of the descriptor page, a1 = guest-virtual address of a 64-bit
/// target GPA, in and out, a2 = [`SEEK_DATA`] or [`SEEK_HOLE`]. The next address from there on,
/// within the view's ranges, that the target's memory has data at, or has none: -KVM_ENOENT where
/// there is no such. Memory without data reads as zeros, and reading it through the window makes
/// the host allocate it.
pub const SEEK: u64 = 42;

/// `KVM_HC_MEM_UNMAP_ALL`: a0 = [`UNMAP_ALL_ZERO`] or [`UNMAP_ALL_KEEP`]. All pages of this machine
/// that [`MEM_MAP`] has replaced become its own again, as if each had been given to [`MEM_UNMAP`];
/// by whom they were mapped does not matter. A kernel that starts another one by kexec calls this
/// before, and a driver when it is loaded. Views stay.
pub const UNMAP_ALL: u64 = 43;

/// a0 of [`UNMAP_ALL`]: the pages read as zeros.
pub const UNMAP_ALL_ZERO: u64 = 0;

/// a0 of [`UNMAP_ALL`]: the pages keep what they show now. For a kernel that may have used them as
/// RAM unawares.
pub const UNMAP_ALL_KEEP: u64 = 1;

/// a2 of [`SEEK`]: look for data.
pub const SEEK_DATA: u64 = 0;

/// a2 of [`SEEK`]: look for a hole.
pub const SEEK_HOLE: u64 = 1;

/// What a guest kernel hands over with [`ATTACH`]. May straddle pages.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct AttachRequest {
    /// The token.
    pub token: [u64; 4],
    /// Process that asked, as its kernel numbers it: for the host's audit log, believed no
    /// further.
    pub pid: u32,
    /// Its user.
    pub uid: u32,
    /// Its name (`TASK_COMM_LEN` bytes), padded with zeros.
    pub comm: [u8; 16],
    /// 0, or [`crate::native::ATTACH_READ_ONLY`].
    pub flags: u32,
    /// 0.
    pub reserved: u32,
}

impl AttachRequest {
    /// Size in bytes.
    pub const SIZE: usize = 64;
}

/// What the host answers to [`ATTACH`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AttachResult {
    /// GPA of the view's descriptor page, which also names the view in [`DETACH`] and [`SEEK`].
    pub descriptor_gpa: u64,
    /// First GPA of the view's part of the window.
    pub window_gpa: u64,
    /// Its length in bytes, as far as it is used.
    pub window_len: u64,
    /// 0.
    pub reserved: u64,
}

impl AttachResult {
    /// Size in bytes.
    pub const SIZE: usize = 32;
}

const _: () = {
    assert!(core::mem::size_of::<AttachRequest>() == AttachRequest::SIZE);
    assert!(core::mem::size_of::<AttachResult>() == AttachResult::SIZE);
};
