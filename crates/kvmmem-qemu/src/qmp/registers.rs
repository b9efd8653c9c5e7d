// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Registers of vCPUs, from the text that QEMU's `info registers` prints (`x86_cpu_dump_state` in
//! target/i386/cpu-dump.c).

use kvmmem_proto::message::{SegmentRegister, VcpuRegisters};
use serde::Deserialize;
use serde_json::json;

use super::{Qmp, QmpError};

/// The command that prints registers.
const COMMAND: &str = "human-monitor-command";

/// Names of the general registers in 64-bit mode, in the order of [`VcpuRegisters::general`].
const GENERAL: [&str; 16] = [
    "RAX", "RBX", "RCX", "RDX", "RSI", "RDI", "RBP", "RSP", "R8", "R9", "R10", "R11", "R12", "R13",
    "R14", "R15",
];

/// Names of the segment registers, in the order of [`VcpuRegisters::segments`].
const SEGMENTS: [&str; 8] = ["ES", "CS", "SS", "DS", "FS", "GS", "LDT", "TR"];

/// A vCPU as `query-cpus-fast` lists it.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Vcpu {
    cpu_index: u32,
}

impl Qmp {
    /// The registers of at most `count` vCPUs from the `first` one on, and whether there are more.
    /// A vCPU that runs is stopped for a moment for it, each at a moment of its own.
    pub fn registers(
        &mut self,
        first: usize,
        count: usize,
    ) -> Result<(Vec<VcpuRegisters>, bool), QmpError> {
        let vcpus: Vec<Vcpu> = self.ask("query-cpus-fast", json!({}))?;
        let mut numbers: Vec<u32> = vcpus.iter().map(|vcpu| vcpu.cpu_index).collect();
        numbers.sort_unstable();
        let more = numbers.len() > first.saturating_add(count);
        let mut registers = Vec::new();
        for number in numbers.into_iter().skip(first).take(count) {
            let arguments = json!({ "command-line": "info registers", "cpu-index": number });
            let text: String = self.ask(COMMAND, arguments)?;
            // It is an answer all the same: the connection is as good as before.
            let garbage = || QmpError::Garbage { path: self.path().to_owned(), command: COMMAND };
            registers.push(parse(&text).ok_or_else(garbage)?);
        }
        Ok((registers, more))
    }
}

/// What the text says; `None` where something is missing or is no number.
fn parse(text: &str) -> Option<VcpuRegisters> {
    // Names are padded before the sign, and values after it.
    let text = text.replace(" =", "=");
    let field = |name: &str| -> Option<&str> {
        let is_start =
            |at: usize| at == 0 || text.as_bytes().get(at - 1).is_some_and(u8::is_ascii_whitespace);
        let mut found = text.match_indices(name).filter(|(at, _)| is_start(*at));
        found.find_map(|(at, _)| text.get(at + name.len()..)?.strip_prefix('=')?.lines().next())
    };
    let words = |name: &str| field(name).map(str::split_ascii_whitespace);
    let number = |name: &str| hex(words(name)?.next()?);
    // Outside of 64-bit mode there is neither the upper half of a register nor R8 to R15.
    let is_long = field("RAX").is_some();
    let mut general = [0; 16];
    for (index, (value, name)) in general.iter_mut().zip(GENERAL).enumerate() {
        *value = match name.strip_prefix('R').filter(|_| index < 8) {
            Some(rest) if !is_long => number(&format!("E{rest}"))?,
            None if !is_long => 0,
            _ => number(name)?,
        };
    }
    let mut segments = [SegmentRegister::default(); 8];
    for (segment, name) in segments.iter_mut().zip(SEGMENTS) {
        let mut words = words(name)?;
        *segment = SegmentRegister {
            selector: u16::try_from(hex(words.next()?)?).ok()?,
            base: hex(words.next()?)?,
            limit: u32::try_from(hex(words.next()?)?).ok()?,
            flags: u32::try_from(hex(words.next()?)?).ok()?,
        };
    }
    let table = |name: &str| {
        let mut words = words(name)?;
        Some((hex(words.next()?)?, u32::try_from(hex(words.next()?)?).ok()?))
    };
    Some(VcpuRegisters {
        general,
        rip: number(if is_long { "RIP" } else { "EIP" })?,
        rflags: number(if is_long { "RFL" } else { "EFL" })?,
        segments,
        gdt: table("GDT")?,
        idt: table("IDT")?,
        cr0: number("CR0")?,
        cr2: number("CR2")?,
        cr3: number("CR3")?,
        cr4: number("CR4")?,
        efer: number("EFER"),
        kernel_gs_base: None,
        lstar: None,
    })
}

fn hex(word: &str) -> Option<u64> {
    // from_str_radix would take a sign.
    let is_hex = word.bytes().all(|byte| byte.is_ascii_hexdigit());
    is_hex.then(|| u64::from_str_radix(word, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// A guest of 64 bits in its idle loop, by QEMU 7.2.
    const LONG: &str = "\r
CPU#0\r
RAX=0001ad4000000000 RBX=0000000000000001 RCX=ffff8f317ea34140 RDX=000000000000005a\r
RSI=0000000000000087 RDI=0000000000000088 RBP=ffffffffa6c13940 RSP=ffffffffa6c03eb0\r
R8 =ffff8f317ea26980 R9 =0000000000000009 R10=0000000000000010 R11=0000000000000011\r
R12=0000000000000012 R13=0000000000000013 R14=0000000000000014 R15=0000000000000015\r
RIP=ffffffffa5ebee7e RFL=00000206 [-----P-] CPL=0 II=0 A20=1 SMM=0 HLT=1\r
ES =0001 0000000000000000 00000000 00000000\r
CS =0010 0000000000000000 ffffffff 00af9b00 DPL=0 CS64 [-RA]\r
SS =0018 0000000000000000 ffffffff 00cf9300 DPL=0 DS   [-WA]\r
DS =0002 0000000000000000 00000000 00000000\r
FS =0003 0000000000000000 00000000 00000000\r
GS =0004 ffff8f317ea00000 00000000 00000000\r
LDT=0000 0000000000000000 00000000 00008200 DPL=0 LDT\r
TR =0040 fffffe0000003000 00004087 00008900 DPL=0 TSS64-avl\r
GDT=     fffffe0000001000 0000007f\r
IDT=     fffffe0000000000 00000fff\r
CR0=80050033 CR2=00000000004bf04c CR3=000000000dc0a000 CR4=00750eb0\r
DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000 \r
DR6=00000000ffff0ff0 DR7=0000000000000400\r
EFER=0000000000000d01\r
FCW=037f FSW=0000 [ST=0] FTW=00 MXCSR=00001f80\r
";

    /// Firmware in real mode.
    const REAL: &str = "EAX=00000001 EBX=00000002 ECX=00000003 EDX=00000004
ESI=00000005 EDI=00000006 EBP=00000007 ESP=00000008
EIP=0000fff0 EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0
ES =0000 00000000 0000ffff 00009300
CS =f000 ffff0000 0000ffff 00009b00
SS =0000 00000000 0000ffff 00009300
DS =0000 00000000 0000ffff 00009300
FS =0000 00000000 0000ffff 00009300
GS =0000 00000000 0000ffff 00009300
LDT=0000 00000000 0000ffff 00008200
TR =0000 00000000 0000ffff 00008b00
GDT=     00000000 0000ffff
IDT=     00000000 0000ffff
CR0=60000010 CR2=00000000 CR3=00000000 CR4=00000000
";

    #[test]
    fn registers_are_read_in_each_mode() {
        let long = parse(LONG).unwrap();
        assert_eq!(long.general[..3], [0x0001_ad40_0000_0000, 1, 0xffff_8f31_7ea3_4140]);
        assert_eq!(
            long.general[5..10],
            [0x88, 0xffff_ffff_a6c1_3940, 0xffff_ffff_a6c0_3eb0, 0xffff_8f31_7ea2_6980, 9]
        );
        assert_eq!(long.general[10..], [0x10, 0x11, 0x12, 0x13, 0x14, 0x15]);
        assert_eq!((long.rip, long.rflags), (0xffff_ffff_a5eb_ee7e, 0x206));
        let segment =
            |selector, base, limit, flags| SegmentRegister { selector, base, limit, flags };
        assert_eq!(long.segments[1], segment(0x10, 0, u32::MAX, 0x00af_9b00));
        assert_eq!(long.segments[5], segment(4, 0xffff_8f31_7ea0_0000, 0, 0));
        assert_eq!(long.segments[7], segment(0x40, 0xffff_fe00_0000_3000, 0x4087, 0x8900));
        assert_eq!(
            (long.gdt, long.idt),
            ((0xffff_fe00_0000_1000, 0x7f), (0xffff_fe00_0000_0000, 0xfff))
        );
        assert_eq!(
            (long.cr0, long.cr2, long.cr3, long.cr4),
            (0x8005_0033, 0x4b_f04c, 0xdc0_a000, 0x75_0eb0)
        );
        assert_eq!(long.efer, Some(0xd01));
        let real = parse(REAL).unwrap();
        assert_eq!(real.general, [1, 2, 3, 4, 5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(real.efer, None);
        assert_eq!(
            (real.rip, real.segments[1]),
            (0xfff0, segment(0xf000, 0xffff_0000, 0xffff, 0x9b00))
        );
    }

    #[test]
    fn what_is_incomplete_is_refused() {
        for (from, to) in [
            ("R15=", "R16="),
            ("R8 =ff", "R8 =+f"),
            ("CS =0010", "CS =10010"),
            ("IDT= ", "IDT=x "),
            ("00000fff", "100000fff"),
        ] {
            assert!(parse(LONG).is_some() && parse(&LONG.replace(from, to)).is_none(), "{from}");
        }
        for end in 0..LONG.find("CR4=").unwrap() {
            assert_eq!(parse(&LONG[..end]), None, "{end}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_read(text in "(([A-Z]{1,3} ?[0-9]?)?=[ 0-9a-f]{0,18}[ \n]?){0,60}", at in 0..900usize, other in ".{0,9}") {
            let _ = parse(&text);
            let _ = parse(&format!("{}{other}{}", &LONG[..at], &LONG[at..]));
        }
    }
}
