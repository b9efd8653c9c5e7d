// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hypercalls forwarded to user space by `KVM_CAP_XEN_HVM` with `INTERCEPT_HCALL`
//! (Documentation/virt/kvm/api.rst, 4.29 and `KVM_EXIT_XEN` in section 5), which kvm-ioctls does
//! not wrap.
//!
//! Once it is on, every `vmcall`/`vmmcall` of that VM exits, from any CPL.

use std::io;

use kvm_bindings::{
    KVM_EXIT_XEN, KVM_EXIT_XEN_HCALL, KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL, KVMIO, kvm_xen_hvm_config,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

mod request {
    use super::{KVMIO, kvm_xen_hvm_config};

    vmm_sys_util::ioctl_iow_nr!(KVM_XEN_HVM_CONFIG, KVMIO, 0x7a, kvm_xen_hvm_config);
}

/// The MSR that stands for Xen's hypercall page. KVM ignores the configuration when it is zero;
/// guests other than Xen's never write it.
const HYPERCALL_MSR: u32 = 0x4000_0200;

/// The exit reason under which [`hypercall`] finds something: `VcpuExit::Unsupported` carries it.
pub const EXIT_REASON: u32 = KVM_EXIT_XEN;

/// Whether this host's KVM can forward hypercalls.
pub fn can_intercept(kvm: &Kvm) -> bool {
    let flags = kvm.check_extension_int(Cap::XenHvm);
    u32::try_from(flags).is_ok_and(|flags| flags & KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL != 0)
}

/// Forwards all hypercalls of `vm` to user space.
///
/// # Errors
/// What the ioctl reports.
pub fn intercept_hypercalls(vm: &VmFd) -> io::Result<()> {
    let config = kvm_xen_hvm_config {
        flags: KVM_XEN_HVM_CONFIG_INTERCEPT_HCALL,
        msr: HYPERCALL_MSR,
        ..Default::default()
    };
    // SAFETY: the request reads one kvm_xen_hvm_config, which `config` is and which outlives the
    // call.
    let result = unsafe { ioctl_with_ref(vm, request::KVM_XEN_HVM_CONFIG(), &config) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// A hypercall that waits for its result.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct XenHypercall {
    /// Privilege level of the caller.
    pub cpl: u32,
    /// Whether the caller ran in 64-bit mode; otherwise only the low 32 bits of a register count.
    pub long_mode: bool,
}

/// The hypercall behind the last exit of `vcpu`; `None` when the exit was another one.
pub fn hypercall(vcpu: &mut VcpuFd) -> Option<XenHypercall> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_XEN {
        return None;
    }
    // SAFETY: the member is plain integers, valid for any bytes; the exit reason says that KVM
    // filled it.
    let xen = unsafe { run.__bindgen_anon_1.xen };
    if xen.type_ != KVM_EXIT_XEN_HCALL {
        return None;
    }
    // SAFETY: this union has one member, plain integers that are valid for any bytes; type and exit
    // reason say that KVM filled it.
    let call = unsafe { xen.u.hcall };
    Some(XenHypercall { cpl: call.cpl, long_mode: call.longmode != 0 })
}

/// Sets the result that the next `KVM_RUN` puts into rax; does nothing when the last exit was no
/// hypercall.
pub fn set_result(vcpu: &mut VcpuFd, result: u64) {
    if hypercall(vcpu).is_some() {
        vcpu.get_kvm_run().__bindgen_anon_1.xen.u.hcall.result = result;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_request_number_is_the_kernels() {
        // _IOW(KVMIO, 0x7a, struct kvm_xen_hvm_config) of <linux/kvm.h>, 56 bytes.
        assert_eq!(request::KVM_XEN_HVM_CONFIG(), 0x4038_ae7a);
    }
}
