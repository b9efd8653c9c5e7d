// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Notes of an ELF core: the vCPUs' registers, as the kernel and QEMU write them, and the kernel's
//! VMCOREINFO.

use kvmmem_client::admin::{SegmentRegister, VcpuRegisters};

/// Type of the note with a thread's registers.
const NT_PRSTATUS: u32 = 1;

/// Notes of a core.
#[derive(Debug, Default)]
pub(super) struct Notes<'a> {
    /// Registers by vCPU.
    pub(super) vcpus: &'a [VcpuRegisters],
    /// Text of the kernel's VMCOREINFO note.
    pub(super) vmcoreinfo: Option<&'a str>,
    /// Where the kernel has all physical memory in its address space.
    pub(super) direct_map: Option<u64>,
}

impl Notes<'_> {
    /// The notes one after the other, as QEMU orders them.
    pub(super) fn bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (number, vcpu) in (1..).zip(self.vcpus) {
            bytes.extend(note("CORE", NT_PRSTATUS, &prstatus(number, vcpu)));
        }
        for vcpu in self.vcpus {
            bytes.extend(note("QEMU", 0, &qemu_state(vcpu)));
        }
        if let Some(text) = self.vmcoreinfo {
            bytes.extend(note("VMCOREINFO", 0, text.as_bytes()));
        }
        bytes
    }
}

/// An ELF note: header, name and content, the latter two padded to 4 bytes.
pub(super) fn note(name: &str, kind: u32, content: &[u8]) -> Vec<u8> {
    let len = |bytes: usize| u32::try_from(bytes).unwrap_or(0).to_le_bytes();
    let mut note = [len(name.len() + 1), len(content.len()), kind.to_le_bytes()].concat();
    note.extend(name.bytes().chain([0]));
    note.resize(note.len().next_multiple_of(4), 0);
    note.extend(content);
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

/// `struct elf_prstatus` of x86-64, 336 bytes: a thread for each vCPU, with its number as process
/// id.
fn prstatus(number: u32, vcpu: &VcpuRegisters) -> Vec<u8> {
    let [ax, bx, cx, dx, si, di, bp, sp, r8, r9, r10, r11, r12, r13, r14, r15] = vcpu.general;
    let [es, cs, ss, ds, fs, gs, ..] = &vcpu.segments;
    let selector = |segment: &SegmentRegister| u64::from(segment.selector);
    // `struct user_regs_struct`; the eleventh from the end is the number of a system call.
    let registers = [
        r15,
        r14,
        r13,
        r12,
        bp,
        bx,
        r11,
        r10,
        r9,
        r8,
        ax,
        cx,
        dx,
        si,
        di,
        0,
        vcpu.rip,
        selector(cs),
        vcpu.rflags,
        sp,
        selector(ss),
        fs.base,
        gs.base,
        selector(ds),
        selector(es),
        selector(fs),
        selector(gs),
    ];
    // Signals; the process id; its relatives and times.
    let mut status = vec![0; 32];
    status.extend(number.to_le_bytes());
    status.extend([0; 76]);
    status.extend(registers.iter().flat_map(|register| register.to_le_bytes()));
    // No floating point.
    status.extend([0; 8]);
    status
}

/// `QEMUCPUState` of version 1, 440 bytes (target/i386/arch_dump.c). The last member is
/// KERNEL_GS_BASE, which QEMU's monitor does not show: it is 0 then.
fn qemu_state(vcpu: &VcpuRegisters) -> Vec<u8> {
    const VERSION: u32 = 1;
    const SIZE: u32 = 440;
    let [ax, bx, cx, dx, si, di, bp, sp, high @ ..] = vcpu.general;
    let [es, cs, ss, ds, fs, gs, ldt, tr] = vcpu.segments;
    let table = |(base, limit)| SegmentRegister { base, limit, ..SegmentRegister::default() };
    let mut state: Vec<u8> = [VERSION, SIZE].iter().flat_map(|word| word.to_le_bytes()).collect();
    let mut words = |words: &[u64]| state.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    words(&[ax, bx, cx, dx, si, di, sp, bp]);
    words(&high);
    words(&[vcpu.rip, vcpu.rflags]);
    for SegmentRegister { selector, base, limit, flags } in
        [cs, ds, es, fs, gs, ss, ldt, tr, table(vcpu.gdt), table(vcpu.idt)]
    {
        words(&[u64::from(limit) << 32 | u64::from(selector), u64::from(flags), base]);
    }
    words(&[vcpu.cr0, 0, vcpu.cr2, vcpu.cr3, vcpu.cr4, vcpu.kernel_gs_base.unwrap_or(0)]);
    state
}

#[cfg(test)]
mod tests {
    use super::super::elf;
    use super::*;

    fn vcpu() -> VcpuRegisters {
        let segment = |n: u8| SegmentRegister {
            selector: u16::from(n),
            base: 0x100 + u64::from(n),
            limit: 0x200 + u32::from(n),
            flags: 0x300 + u32::from(n),
        };
        VcpuRegisters {
            general: std::array::from_fn(|n| 0x1000 + n as u64),
            rip: 0xffff_ffff_8100_0000,
            rflags: 0x246,
            segments: [0, 1, 2, 3, 4, 5, 6, 7].map(segment),
            gdt: (0x111, 0x7f),
            idt: (0x222, 0xfff),
            cr0: 0x8005_0033,
            cr2: 2,
            cr3: 3,
            cr4: 4,
            kernel_gs_base: Some(5),
            ..VcpuRegisters::default()
        }
    }

    fn word(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    /// The offsets are those of the kernel's and QEMU's structures, as `pahole` shows them.
    #[test]
    fn registers_are_where_tools_look_for_them() {
        let status = prstatus(7, &vcpu());
        assert_eq!((status.len(), status[32]), (336, 7));
        for (at, value) in [
            (112, 0x100f),
            (112 + 80, 0x1000),
            (112 + 128, 0xffff_ffff_8100_0000),
            (112 + 152, 0x1007),
        ] {
            assert_eq!(word(&status, at), value, "{at}");
        }
        // cs, eflags, ss, fs_base, gs_base, ds, es, fs, gs
        let rest: Vec<u64> =
            [136, 144, 160, 168, 176, 184, 192, 200, 208].map(|at| word(&status, 112 + at)).into();
        assert_eq!(rest, [1, 0x246, 2, 0x104, 0x105, 3, 0, 4, 5]);
        let state = qemu_state(&vcpu());
        assert_eq!((state.len(), word(&state, 0)), (440, 440 << 32 | 1));
        for (at, value) in [
            (8, 0x1000),
            (56, 0x1007),
            (64, 0x1006),
            (72, 0x1008),
            (136, 0xffff_ffff_8100_0000),
            (144, 0x246),
        ] {
            assert_eq!(word(&state, at), value, "{at}");
        }
        // CS, SS, IDT, CR0, CR2 to CR4.
        assert_eq!(
            (word(&state, 152), word(&state, 160), word(&state, 168)),
            (0x201 << 32 | 1, 0x301, 0x101)
        );
        assert_eq!(
            (word(&state, 272), word(&state, 368), word(&state, 384)),
            (0x202 << 32 | 2, 0xfff << 32, 0x222)
        );
        assert_eq!(
            [392, 400, 408, 416, 424, 432].map(|at| word(&state, at)),
            [0x8005_0033, 0, 2, 3, 4, 5]
        );
    }

    #[test]
    fn notes_are_ordered_and_padded() {
        let (range, vcpus) = (0x1000..0x3000, [vcpu(), vcpu()]);
        let notes = Notes {
            vcpus: &vcpus,
            vmcoreinfo: Some("A=1\n"),
            direct_map: Some(0xffff_8880_0000_0000),
        };
        let load = elf::Load::physical(&range, 0x2000, notes.direct_map);
        let head = elf::head(&[load], &notes.bytes());
        assert_eq!(head.len() as u64, elf::head_len(1, &notes.bytes()));
        let at = 64 + 2 * 56;
        let sizes = [20 + 336, 20 + 336, 20 + 440, 20 + 440];
        let names: [&[u8]; 5] = [b"CORE\0", b"CORE\0", b"QEMU\0", b"QEMU\0", b"VMCOREINFO\0"];
        let mut offset = at;
        for (number, name) in names.iter().enumerate() {
            assert!(head[offset + 12..].starts_with(name), "{number}");
            offset += sizes.get(number).copied().unwrap_or(24 + 4);
        }
        assert_eq!(offset, head.len());
        assert_eq!((head[at + 20 + 32], head[at + 356 + 20 + 32]), (1, 2));
        // The second program header: p_vaddr, p_paddr.
        assert_eq!(
            (word(&head, 64 + 56 + 16), word(&head, 64 + 56 + 24)),
            (0xffff_8880_0000_1000, 0x1000)
        );
        assert_eq!(note("AB", 0, b"x"), *b"\x03\0\0\0\x01\0\0\0\0\0\0\0AB\0\0x\0\0\0");
    }
}
