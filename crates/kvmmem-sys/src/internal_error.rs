// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Data of `KVM_EXIT_INTERNAL_ERROR` (Documentation/virt/kvm/api.rst, section 5), which kvm-ioctls
//! does not wrap.

use kvm_bindings::KVM_EXIT_INTERNAL_ERROR;
use kvm_ioctls::VcpuFd;

/// An internal error of KVM: `kvm_run.internal`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InternalError {
    /// `KVM_INTERNAL_ERROR_*`.
    pub suberror: u32,
    /// At most 16 words. Their meaning depends on the suberror, the CPU's vendor and the kernel's
    /// version.
    pub data: Vec<u64>,
}

impl InternalError {
    fn new(suberror: u32, count: u32, words: &[u64]) -> Self {
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        Self { suberror, data: words.get(..count).unwrap_or(words).to_vec() }
    }
}

/// The internal error of the last exit of `vcpu`; `None` when the exit was another one.
pub fn last(vcpu: &mut VcpuFd) -> Option<InternalError> {
    let run = vcpu.get_kvm_run();
    if run.exit_reason != KVM_EXIT_INTERNAL_ERROR {
        return None;
    }
    // SAFETY: the member is plain integers, valid for any bytes; the exit reason says that KVM
    // filled it. (After a failed emulation KVM fills `emulation_failure`, where suberror and
    // ndata are the same and names are given to the data.)
    let internal = unsafe { run.__bindgen_anon_1.internal };
    Some(InternalError::new(internal.suberror, internal.ndata, &internal.data))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_count_of_data_is_not_trusted() {
        assert!(InternalError::new(3, 0, &[7; 16]).data.is_empty());
        assert_eq!(InternalError::new(3, 2, &[1, 2, 3]).data, [1, 2]);
        assert_eq!(InternalError::new(3, u32::MAX, &[7; 16]).data, [7; 16]);
    }
}
