// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The registers of a vCPU, as far as a core file and a look at the guest's kernel need them.

use serde::{Deserialize, Serialize};

/// A vCPU's registers at one moment. The guest sets most of them to what it likes.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VcpuRegisters {
    /// RAX, RBX, RCX, RDX, RSI, RDI, RBP, RSP, R8 to R15.
    pub general: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// ES, CS, SS, DS, FS, GS, LDTR, TR: the order in which processors number the first six.
    pub segments: [SegmentRegister; 8],
    /// GDTR: base and limit.
    pub gdt: (u64, u32),
    /// IDTR: base and limit.
    pub idt: (u64, u32),
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// EFER, where the VMM shows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub efer: Option<u64>,
}

/// A segment register with its hidden part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SegmentRegister {
    /// What programs see of it.
    pub selector: u16,
    /// Where the segment begins.
    pub base: u64,
    /// Its last byte.
    pub limit: u32,
    /// Type and access, as in the second word of a descriptor.
    pub flags: u32,
}
