// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Decodes a hypercall from the registers that carry it.

use kvm_bindings::kvm_regs;
use kvmmem_abi::hypercall::{ATTACH, DETACH, MEM_MAP, MEM_UNMAP, SEEK, UNMAP_ALL};

/// A decoded hypercall. Addresses are as the guest gave them: nothing is checked yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Hypercall {
    /// `KVM_HC_MEM_MAP`.
    MemMap {
        /// Guest-virtual address of the 32-byte token.
        token_gva: u64,
        /// GPA in the target.
        target_gpa: u64,
        /// GPA of the own page to replace.
        own_gpa: u64,
    },
    /// `KVM_HC_MEM_UNMAP`.
    MemUnmap {
        /// GPA of the own page to restore.
        own_gpa: u64,
    },
    /// `KVM_HC_VIEW_ATTACH`.
    Attach {
        /// Guest-virtual address of the request.
        request_gva: u64,
        /// Guest-virtual address of the result.
        result_gva: u64,
    },
    /// `KVM_HC_VIEW_DETACH`.
    Detach {
        /// GPA of the view's descriptor page.
        descriptor_gpa: u64,
    },
    /// `KVM_HC_VIEW_SEEK`.
    Seek {
        /// GPA of the view's descriptor page.
        descriptor_gpa: u64,
        /// Guest-virtual address of the target GPA, in and out.
        position_gva: u64,
        /// What to look for.
        what: u64,
    },
    /// `KVM_HC_MEM_UNMAP_ALL`.
    UnmapAll {
        /// What becomes of the pages' content.
        content: u64,
    },
    /// Any other number.
    Unknown {
        /// The number.
        number: u64,
    },
}

/// How much of a register counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Width {
    /// 64-bit mode.
    Long,
    /// Any other mode: the low 32 bits.
    Legacy,
}

/// The number and the first three arguments, in the order of `kvmmem_abi::hypercall`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) number: u64,
    pub(super) arguments: [u64; 3],
}

impl Registers {
    /// As `vmcall` carries them: rax; rbx, rcx, rdx.
    pub(super) fn of_vmcall(regs: &kvm_regs) -> Self {
        Self { number: regs.rax, arguments: [regs.rbx, regs.rcx, regs.rdx] }
    }

    /// As the doorbell carries them: rax; rbx, rcx, rdi (rdx names the port).
    pub(super) fn of_doorbell(regs: &kvm_regs) -> Self {
        Self { number: regs.rax, arguments: [regs.rbx, regs.rcx, regs.rdi] }
    }

    /// Decodes the call.
    pub(super) fn decode(self, width: Width) -> Hypercall {
        let mask = match width {
            Width::Long => u64::MAX,
            Width::Legacy => u64::from(u32::MAX),
        };
        let [a0, a1, a2] = self.arguments.map(|argument| argument & mask);
        match self.number & mask {
            MEM_MAP => Hypercall::MemMap { token_gva: a0, target_gpa: a1, own_gpa: a2 },
            MEM_UNMAP => Hypercall::MemUnmap { own_gpa: a0 },
            ATTACH => Hypercall::Attach { request_gva: a0, result_gva: a1 },
            DETACH => Hypercall::Detach { descriptor_gpa: a0 },
            SEEK => Hypercall::Seek { descriptor_gpa: a0, position_gva: a1, what: a2 },
            UNMAP_ALL => Hypercall::UnmapAll { content: a0 },
            number => Hypercall::Unknown { number },
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn registers() -> impl Strategy<Value = kvm_regs> {
        (prop_oneof![30..45u64, any::<u64>()], any::<[u64; 5]>()).prop_map(
            |(rax, [rbx, rcx, rdx, rsi, rdi])| kvm_regs {
                rax,
                rbx,
                rcx,
                rdx,
                rsi,
                rdi,
                ..Default::default()
            },
        )
    }

    proptest! {
        #[test]
        fn any_registers_decode_to_what_they_say(regs in registers()) {
            for (call, a2) in [(Registers::of_vmcall(&regs), regs.rdx), (Registers::of_doorbell(&regs), regs.rdi)] {
                let expected = match regs.rax {
                    32 => Hypercall::MemMap { token_gva: regs.rbx, target_gpa: regs.rcx, own_gpa: a2 },
                    33 => Hypercall::MemUnmap { own_gpa: regs.rbx },
                    40 => Hypercall::Attach { request_gva: regs.rbx, result_gva: regs.rcx },
                    41 => Hypercall::Detach { descriptor_gpa: regs.rbx },
                    42 => Hypercall::Seek { descriptor_gpa: regs.rbx, position_gva: regs.rcx, what: a2 },
                    43 => Hypercall::UnmapAll { content: regs.rbx },
                    number => Hypercall::Unknown { number },
                };
                prop_assert_eq!(call.decode(Width::Long), expected);
            }
        }

        #[test]
        fn legacy_modes_have_32_bits(mut regs in registers()) {
            let wide = Registers::of_vmcall(&regs).decode(Width::Legacy);
            for register in [&mut regs.rax, &mut regs.rbx, &mut regs.rcx, &mut regs.rdx] {
                *register &= 0xffff_ffff;
            }
            prop_assert_eq!(wide, Registers::of_vmcall(&regs).decode(Width::Long));
        }
    }
}
