// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Registers of a vCPU as the broker's clients see them.

use kvm_bindings::{kvm_dtable, kvm_regs, kvm_segment};
use kvmmem_client::vmm::{SegmentRegister, VcpuRegisters};

use crate::machine::registers::Registers;

/// Arranges what KVM reports.
pub(super) fn arrange(registers: &Registers) -> VcpuRegisters {
    let kvm_regs {
        rax,
        rbx,
        rcx,
        rdx,
        rsi,
        rdi,
        rsp,
        rbp,
        r8,
        r9,
        r10,
        r11,
        r12,
        r13,
        r14,
        r15,
        rip,
        rflags,
    } = registers.general;
    let sregs = registers.system;
    let table = |table: kvm_dtable| (table.base, u32::from(table.limit));
    VcpuRegisters {
        general: [rax, rbx, rcx, rdx, rsi, rdi, rbp, rsp, r8, r9, r10, r11, r12, r13, r14, r15],
        rip,
        rflags,
        segments: [sregs.es, sregs.cs, sregs.ss, sregs.ds, sregs.fs, sregs.gs, sregs.ldt, sregs.tr]
            .map(segment),
        gdt: table(sregs.gdt),
        idt: table(sregs.idt),
        cr0: sregs.cr0,
        cr2: sregs.cr2,
        cr3: sregs.cr3,
        cr4: sregs.cr4,
        efer: Some(sregs.efer),
        kernel_gs_base: registers.kernel_gs_base,
        lstar: registers.lstar,
    }
}

/// The flags are where the second word of a descriptor has them.
fn segment(segment: kvm_segment) -> SegmentRegister {
    let kvm_segment { base, limit, selector, type_, present, dpl, db, s, l, g, avl, .. } = segment;
    let bits =
        [(type_, 8), (s, 12), (dpl, 13), (present, 15), (avl, 20), (l, 21), (db, 22), (g, 23)];
    let flags = bits.into_iter().fold(0, |flags, (value, shift)| flags | u32::from(value) << shift);
    SegmentRegister { selector, base, limit, flags }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_flags_are_those_of_a_descriptor() {
        // Linux's 64-bit code segment, as QEMU shows it without the limit's upper bits.
        let code = kvm_segment {
            selector: 0x10,
            limit: u32::MAX,
            type_: 11,
            present: 1,
            s: 1,
            l: 1,
            g: 1,
            ..Default::default()
        };
        assert_eq!(
            segment(code),
            SegmentRegister { selector: 0x10, base: 0, limit: u32::MAX, flags: 0x00a0_9b00 }
        );
        let user = kvm_segment {
            type_: 3,
            present: 1,
            dpl: 3,
            db: 1,
            s: 1,
            g: 1,
            avl: 1,
            ..Default::default()
        };
        assert_eq!(segment(user).flags, 0x00d0_f300);
    }
}
