// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guests of a few instructions: assembled here, packed as an ELF kernel, entered in 64-bit mode at
//! CPL 0 with the first 4 GiB mapped one to one. What they report goes to the serial port, eight
//! bytes a value.

use std::path::Path;

use kvmmem_abi::cpuid::DOORBELL_PORT;

/// Where the code is loaded.
const LOAD_ADDRESS: u64 = 0x20_0000;
const SERIAL_PORT: u32 = 0x3f8;
const POWER_PORT: u32 = 0x600;
const RESET_PORT: u32 = 0x602;

/// Page tables as the VMM makes them: what a guest changes to get other translations.
pub(crate) const PML4: u64 = 0x9000;
pub(crate) const PAGE_POINTERS: u64 = 0xa000;
pub(crate) const PAGE_DIRECTORY: u64 = 0xb000;

/// First GPA of the windows, behind a bare guest's RAM and the devices.
pub(crate) const WINDOW: u64 = 4 << 30;
/// How much of it [`Guest::see_windows`] maps.
pub(crate) const WINDOW_BYTES: u64 = 32 << 20;

/// Where [`Guest::second_cpu`] puts the code that the CPU starts with.
pub(crate) const TRAMPOLINE: u64 = 0x4_0000;

/// Vector of [`Guest::route`].
const ROUTED_VECTOR: u32 = 0x60;

/// How a guest makes hypercalls.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Method {
    /// `in eax, dx` at the doorbell.
    #[default]
    Doorbell,
    /// `vmmcall`, which KVM turns into `vmcall` on Intel's CPUs.
    Vmmcall,
}

/// A guest's program.
#[derive(Clone, Default)]
pub(crate) struct Guest {
    method: Method,
    code: Vec<u8>,
}

impl Guest {
    /// `mov rax, value; mov [gpa], rax`
    pub(crate) fn write(self, gpa: u64, value: u64) -> Self {
        self.load_rax(value)
            .bytes(&[0x48, 0xbb])
            .bytes(&gpa.to_le_bytes())
            .bytes(&[0x48, 0x89, 0x03])
    }

    /// Writes a token's four words.
    pub(crate) fn write_token(self, gva: u64, token: [u64; 4]) -> Self {
        (0..).zip(token).fold(self, |guest, (index, word)| guest.write(gva + 8 * index, word))
    }

    /// `mov rax, [gpa]`, reported.
    pub(crate) fn report_memory(self, gpa: u64) -> Self {
        self.bytes(&[0x48, 0xbb]).bytes(&gpa.to_le_bytes()).bytes(&[0x48, 0x8b, 0x03]).report_rax()
    }

    /// Maps [`WINDOW_BYTES`] from [`WINDOW`] on one to one, by large pages whose directory is at
    /// `scratch`.
    pub(crate) fn see_windows(self, scratch: u64) -> Self {
        const LARGE_PRESENT_WRITABLE: u64 = 0x83;
        let guest = (0..WINDOW_BYTES >> 21).fold(self, |guest, page| {
            guest.write(scratch + 8 * page, (WINDOW + (page << 21)) | LARGE_PRESENT_WRITABLE)
        });
        guest.write(PAGE_POINTERS + 8 * (WINDOW >> 30), scratch | 3)
    }

    /// An empty program whose hypercalls go by `method`.
    pub(crate) fn calling(method: Method) -> Self {
        Self { method, code: Vec::new() }
    }

    pub(crate) fn method(&self) -> Method {
        self.method
    }

    /// Makes a hypercall and reports the result, sign-extended.
    pub(crate) fn call(self, number: u64, arguments: [u64; 3]) -> Self {
        self.call_and(number, arguments, |guest| guest)
    }

    /// As [`Guest::call`], with `body` between the call and the report, which leaves rax alone.
    pub(crate) fn call_and(
        self,
        number: u64,
        arguments: [u64; 3],
        body: impl FnOnce(Self) -> Self,
    ) -> Self {
        let guest = body(self.ring(number, arguments));
        match guest.method {
            // cdqe
            Method::Doorbell => guest.bytes(&[0x48, 0x98]).report_rax(),
            Method::Vmmcall => guest.report_rax(),
        }
    }

    /// Makes a hypercall and drops the result.
    pub(crate) fn ring(self, number: u64, [a0, a1, a2]: [u64; 3]) -> Self {
        let guest = self
            .load_rax(number)
            .bytes(&[0x48, 0xbb])
            .bytes(&a0.to_le_bytes())
            .bytes(&[0x48, 0xb9])
            .bytes(&a1.to_le_bytes());
        match guest.method {
            // mov rdi, a2; in eax, dx
            Method::Doorbell => guest
                .bytes(&[0x48, 0xbf])
                .bytes(&a2.to_le_bytes())
                .load_edx(DOORBELL_PORT.into())
                .bytes(&[0xed]),
            // mov rdx, a2; xor edi, edi; vmmcall
            Method::Vmmcall => guest
                .bytes(&[0x48, 0xba])
                .bytes(&a2.to_le_bytes())
                .bytes(&[0x31, 0xff, 0x0f, 0x01, 0xd9]),
        }
    }

    /// Makes a hypercall by the doorbell whose result KVM itself stores at `to`.
    pub(crate) fn ring_into(self, number: u64, [a0, a1]: [u64; 2], to: u64) -> Self {
        // mov rbx, a0; mov rcx, a1; mov rdi, to; insd
        self.load_rax(number)
            .bytes(&[0x48, 0xbb])
            .bytes(&a0.to_le_bytes())
            .bytes(&[0x48, 0xb9])
            .bytes(&a1.to_le_bytes())
            .bytes(&[0x48, 0xbf])
            .bytes(&to.to_le_bytes())
            .load_edx(DOORBELL_PORT.into())
            .bytes(&[0x6d])
    }

    /// `cpuid`; reports eax and ebx as one value, then ecx and edx.
    pub(crate) fn cpuid(self, leaf: u32) -> Self {
        self.bytes(&[0xb8])
            .bytes(&leaf.to_le_bytes())
            .bytes(&[0x31, 0xc9, 0x0f, 0xa2])
            // rax |= rbx << 32; r8 = rcx | rdx << 32
            .bytes(&[0x48, 0xc1, 0xe3, 0x20, 0x48, 0x09, 0xd8])
            .bytes(&[0x49, 0x89, 0xc8, 0x48, 0xc1, 0xe2, 0x20, 0x49, 0x09, 0xd0])
            .report_rax()
            .bytes(&[0x4c, 0x89, 0xc0])
            .report_rax()
    }

    /// Goes on at CPL 3, with port access: the page tables let users in, a GDT at `scratch` has
    /// segments for them.
    pub(crate) fn drop_to_user(self, scratch: u64) -> Self {
        const USER_CODE: u64 = 0x00af_fb00_0000_ffff;
        const USER_DATA: u64 = 0x00cf_f300_0000_ffff;
        const PRESENT_WRITABLE_USER: u64 = 7;
        const LARGE: u64 = 0x80;
        let mut guest = self
            .write(PML4, PAGE_POINTERS | PRESENT_WRITABLE_USER)
            .write(PAGE_POINTERS, PAGE_DIRECTORY | PRESENT_WRITABLE_USER)
            .write(PAGE_DIRECTORY, PRESENT_WRITABLE_USER | LARGE)
            .write(PAGE_DIRECTORY + 8, LOAD_ADDRESS | PRESENT_WRITABLE_USER | LARGE)
            .write(scratch, 0)
            .write(scratch + 8, USER_CODE)
            .write(scratch + 16, USER_DATA)
            // The descriptor for lgdt: a limit of 16 bits, a base of 64.
            .write(scratch + 32, scratch << 16 | 23)
            .write(scratch + 40, scratch >> 48)
            // mov rax, cr3; mov cr3, rax
            .bytes(&[0x0f, 0x20, 0xd8, 0x0f, 0x22, 0xd8])
            .load_rax(scratch + 32)
            // lgdt [rax]
            .bytes(&[0x0f, 0x01, 0x10])
            // push ss (0x13), rsp, rflags (IOPL 3), cs (0x0b)
            .bytes(&[0x6a, 0x13, 0x68])
            .bytes(&0x7000u32.to_le_bytes())
            .bytes(&[0x68])
            .bytes(&0x3002u32.to_le_bytes())
            .bytes(&[0x6a, 0x0b]);
        // mov rax, next; push rax; iretq
        let next = LOAD_ADDRESS + guest.code.len() as u64 + 10 + 1 + 2;
        guest = guest.load_rax(next).bytes(&[0x50, 0x48, 0xcf]);
        assert_eq!(LOAD_ADDRESS + guest.code.len() as u64, next);
        guest
    }

    /// Does `body` unless the eight bytes at `gpa` are zero.
    pub(crate) fn skip_if_zero(self, gpa: u64, body: impl Fn(Self) -> Self) -> Self {
        let length = body(Self::calling(self.method)).code.len();
        // mov rbx, gpa; cmp qword [rbx], 0; je behind the body
        let guest =
            self.bytes(&[0x48, 0xbb]).bytes(&gpa.to_le_bytes()).bytes(&[0x48, 0x83, 0x3b, 0x00]);
        body(guest.bytes(&[0x0f, 0x84]).bytes(&i32::try_from(length).unwrap().to_le_bytes()))
    }

    /// Repeats `body` `count` times.
    pub(crate) fn repeat(self, count: u32, body: impl Fn(Self) -> Self) -> Self {
        // mov r9d, count
        let mut guest = self.bytes(&[0x41, 0xb9]).bytes(&count.to_le_bytes());
        let start = guest.code.len();
        guest = body(guest).bytes(&[0x41, 0xff, 0xc9, 0x0f, 0x85]);
        let back = i32::try_from(start).unwrap() - i32::try_from(guest.code.len() + 4).unwrap();
        guest.bytes(&back.to_le_bytes())
    }

    /// Reads the eight bytes at `gpa`, and writes those behind them if `writes`, as long as those
    /// at `sign` are `value`.
    pub(crate) fn touch_while(self, sign: u64, value: u64, gpa: u64, writes: bool) -> Self {
        // mov rbx, sign; mov r11, gpa; mov r10, value
        let guest = self.bytes(&[0x48, 0xbb]).bytes(&sign.to_le_bytes());
        let guest = guest.bytes(&[0x49, 0xbb]).bytes(&gpa.to_le_bytes());
        let guest = guest.bytes(&[0x49, 0xba]).bytes(&value.to_le_bytes());
        // mov rax, [r11]; mov [r11 + 8], r10; cmp [rbx], r10; je back
        let guest = guest.bytes(&[0x49, 0x8b, 0x03]);
        if writes {
            guest.bytes(&[0x4d, 0x89, 0x53, 0x08, 0x4c, 0x39, 0x13, 0x74, 0xf4])
        } else {
            guest.bytes(&[0x4c, 0x39, 0x13, 0x74, 0xf8])
        }
    }

    /// Starts the second CPU, which does `body` and halts. Uses the page at [`TRAMPOLINE`].
    pub(crate) fn second_cpu(self, body: impl Fn(Self) -> Self) -> Self {
        const LAPIC_COMMAND: u64 = 0xfee0_0300;
        const CODE_64: u64 = 0x00af_9a00_0000_ffff;
        const GDT: u64 = TRAMPOLINE + 0x80;
        let length = body(Self::calling(self.method)).halt().code.len();
        // jmp behind the body
        let guest = self.bytes(&[0xe9]).bytes(&i32::try_from(length).unwrap().to_le_bytes());
        let entry = u32::try_from(LOAD_ADDRESS).unwrap() + u32::try_from(guest.code.len()).unwrap();
        let guest = body(guest).halt();
        // cli; lgdt cs:[0xc0]; cr4 = PAE; cr3 = PML4; EFER |= LME; cr0 = PE and PG; jmp 8:entry. In
        // real mode.
        let mut code = vec![0xfa, 0x2e, 0x66, 0x0f, 0x01, 0x16, 0xc0, 0x00];
        code.extend([0x66, 0xb8, 0x20, 0, 0, 0, 0x0f, 0x22, 0xe0, 0x66, 0xb8]);
        code.extend(u32::try_from(PML4).unwrap().to_le_bytes());
        code.extend([0x0f, 0x22, 0xd8, 0x66, 0xb9, 0x80, 0, 0, 0xc0, 0x0f, 0x32]);
        code.extend([
            0x66, 0x0d, 0, 1, 0, 0, 0x0f, 0x30, 0x66, 0xb8, 1, 0, 0, 0x80, 0x0f, 0x22, 0xc0, 0x66,
            0xea,
        ]);
        code.extend(entry.to_le_bytes());
        code.extend([8, 0]);
        code.resize(0x80, 0);
        let words = code.as_chunks::<8>().0.iter().map(|word| u64::from_le_bytes(*word));
        let guest = (0..)
            .zip(words)
            .fold(guest, |guest, (index, word)| guest.write(TRAMPOLINE + 8 * index, word));
        let guest =
            guest.write(GDT, 0).write(GDT + 8, CODE_64).write(TRAMPOLINE + 0xc0, GDT << 16 | 15);
        // To all but this one: INIT, then the address to start at.
        let vector = u32::try_from(TRAMPOLINE >> 12).unwrap();
        guest.write_dword(LAPIC_COMMAND, 0xc4500).write_dword(LAPIC_COMMAND, 0xc4600 | vector)
    }

    /// Has a timer interrupt this CPU about every millisecond, at which it sends a byte to the
    /// serial port. Uses a page at `scratch`.
    pub(crate) fn start_timer(self, scratch: u64) -> Self {
        const LAPIC: u64 = 0xfee0_0000;
        const VECTOR: u32 = 0x40;
        const PERIODIC: u32 = 1 << 17;
        const CODE_SELECTOR: u64 = 0x10;
        const INTERRUPT_GATE: u64 = 0x8e << 40;
        let acknowledge = u32::try_from(LAPIC + 0xb0).unwrap();
        // push rax, rdx, rbx; out dx, al; mov [acknowledge], edx
        let mut handler = vec![0x50, 0x52, 0x53, 0xba];
        handler.extend(SERIAL_PORT.to_le_bytes());
        handler.extend([0xee, 0xbb]);
        handler.extend(acknowledge.to_le_bytes());
        // pop rbx, rdx, rax; iretq
        handler.extend([0x89, 0x13, 0x5b, 0x5a, 0x58, 0x48, 0xcf]);
        // jmp behind the handler
        let guest = self.bytes(&[0xeb, u8::try_from(handler.len()).unwrap()]);
        let entry = LOAD_ADDRESS + guest.code.len() as u64;
        let gate =
            entry & 0xffff | CODE_SELECTOR << 16 | INTERRUPT_GATE | (entry >> 16 & 0xffff) << 48;
        let at = scratch + 16 * u64::from(VECTOR);
        guest
            .bytes(&handler)
            .write(at, gate)
            .write(at + 8, 0)
            .load_interrupt_table(scratch, scratch + 0x800)
            .write_dword(LAPIC + 0xf0, 0x1ff)
            .write_dword(LAPIC + 0x3e0, 0xb)
            .write_dword(LAPIC + 0x320, PERIODIC | VECTOR)
            // KVM's timer counts nanoseconds.
            .write_dword(LAPIC + 0x380, 1_000_000)
            // sti
            .bytes(&[0xfb])
    }

    /// Has the I/O APIC deliver `gsi`, edge-triggered, to this CPU, which takes no interrupts.
    pub(crate) fn route(self, gsi: u32) -> Self {
        const SELECT: u64 = 0xfec0_0000;
        const LAPIC_SPURIOUS: u64 = 0xfee0_00f0;
        let low = 0x10 + 2 * gsi;
        self.write_dword(LAPIC_SPURIOUS, 0x1ff)
            .write_dword(SELECT, low + 1)
            .write_dword(SELECT + 0x10, 0)
            .write_dword(SELECT, low)
            .write_dword(SELECT + 0x10, ROUTED_VECTOR)
    }

    /// Waits until what [`Guest::route`] delivers is pending.
    pub(crate) fn wait_for_interrupt(self) -> Self {
        // The register of the request bits of 32 vectors.
        let register = u32::try_from(0xfee0_0200 + u64::from(ROUTED_VECTOR / 32) * 16).unwrap();
        // mov ebx, register; mov eax, [rbx]; test eax, eax; jz -6
        self.bytes(&[0xbb])
            .bytes(&register.to_le_bytes())
            .bytes(&[0x8b, 0x03, 0x85, 0xc0, 0x74, 0xfa])
    }

    /// Has the interrupt table for vectors below 128 at `table`. Uses 16 bytes at `scratch`.
    pub(crate) fn load_interrupt_table(self, table: u64, scratch: u64) -> Self {
        // The descriptor for lidt: a limit of 16 bits, a base of 64.
        let guest = self.write(scratch, table << 16 | 0x7ff).write(scratch + 8, table >> 48);
        // lidt [rax]
        guest.load_rax(scratch).bytes(&[0x0f, 0x01, 0x18])
    }

    /// `int3`
    pub(crate) fn breakpoint(self) -> Self {
        self.bytes(&[0xcc])
    }

    /// Ends what [`Guest::start_timer`] began.
    pub(crate) fn mask_interrupts(self) -> Self {
        // cli
        self.bytes(&[0xfa])
    }

    /// `mov eax, value; mov [gpa], eax`
    fn write_dword(self, gpa: u64, value: u32) -> Self {
        let guest = self.bytes(&[0x48, 0xbb]).bytes(&gpa.to_le_bytes());
        guest.bytes(&[0xb8]).bytes(&value.to_le_bytes()).bytes(&[0x89, 0x03])
    }

    /// Powers the machine off.
    pub(crate) fn power_off(self) -> Self {
        self.out_byte(POWER_PORT, 1 << 5 | 5 << 2).halt()
    }

    /// Resets the machine.
    pub(crate) fn reset(self) -> Self {
        self.out_byte(RESET_PORT, 1).halt()
    }

    /// Jumps to the reset vector. A kernel does so in real mode; the code there means the same in
    /// 64-bit mode.
    pub(crate) fn jump_to_reset_vector(self) -> Self {
        const RESET_VECTOR: u64 = 0xf_fff0;
        self.jump(RESET_VECTOR)
    }

    /// `jmp rax`
    pub(crate) fn jump(self, to: u64) -> Self {
        self.load_rax(to).bytes(&[0xff, 0xe0])
    }

    /// An exception without a handler.
    pub(crate) fn crash(self) -> Self {
        self.bytes(&[0x0f, 0x0b]).halt()
    }

    /// A loop that does nothing.
    pub(crate) fn spin(self) -> Self {
        self.bytes(&[0xeb, 0xfe])
    }

    /// `hlt`, again and again.
    pub(crate) fn halt(self) -> Self {
        self.bytes(&[0xf4, 0xeb, 0xfd])
    }

    /// Writes the program as an ELF kernel.
    pub(crate) fn write_elf(&self, path: &Path) {
        const CODE_OFFSET: u64 = 120;
        let length = self.code.len() as u64;
        let mut file = Vec::new();
        file.extend(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        // ET_EXEC, EM_X86_64, version 1.
        file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        file.extend(LOAD_ADDRESS.to_le_bytes());
        file.extend(64u64.to_le_bytes());
        file.extend(0u64.to_le_bytes());
        // Flags, sizes of the headers, one program header, no sections.
        file.extend([0, 0, 0, 0, 64, 0, 56, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        // PT_LOAD, readable and executable.
        file.extend([1, 0, 0, 0, 5, 0, 0, 0]);
        for field in [CODE_OFFSET, LOAD_ADDRESS, LOAD_ADDRESS, length, length, 1] {
            file.extend(field.to_le_bytes());
        }
        assert_eq!(file.len() as u64, CODE_OFFSET);
        file.extend(&self.code);
        std::fs::write(path, file).unwrap();
    }

    fn report_rax(self) -> Self {
        // Eight times: out dx, al; shr rax, 8.
        (0..8).fold(self.load_edx(SERIAL_PORT), |guest, _| {
            guest.bytes(&[0xee, 0x48, 0xc1, 0xe8, 0x08])
        })
    }

    fn out_byte(self, port: u32, value: u8) -> Self {
        self.load_rax(value.into()).load_edx(port).bytes(&[0xee])
    }

    fn load_rax(self, value: u64) -> Self {
        self.bytes(&[0x48, 0xb8]).bytes(&value.to_le_bytes())
    }

    fn load_edx(self, value: u32) -> Self {
        self.bytes(&[0xba]).bytes(&value.to_le_bytes())
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.code.extend(bytes);
        self
    }
}
