// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The registers of a vCPU, as far as a core file and a look at the guest's kernel need them; and
//! what the broker asks a VMM that has registered its own VM about the vCPUs.

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
    /// MSR_KERNEL_GS_BASE, where the VMM shows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub kernel_gs_base: Option<u64>,
    /// MSR_LSTAR, where 64-bit code enters the kernel by SYSCALL, where the VMM shows it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lstar: Option<u64>,
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

/// What the broker asks a VMM about its VM's vCPUs ([`super::FromBroker::AskVcpus`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VcpuQuestion {
    /// The registers of at most `count` vCPUs. Answer: [`VcpuAnswer::Registers`].
    Registers {
        /// The first vCPU.
        first: u32,
        /// How many.
        count: u32,
    },
    /// Stop the vCPUs. They run again with [`VcpuQuestion::Resume`], when the connection ends, and
    /// 15 s after the last of these from the same holder. Answer: [`VcpuAnswer::Paused`].
    Pause {
        /// Who needs them stopped. They run once no holder does.
        holder: u64,
        /// Whether the holder has not stopped them yet; if it has, they must not have run since.
        is_new: bool,
    },
    /// A holder does not need them stopped any more. Answer: [`VcpuAnswer::Resumed`].
    Resume {
        /// The holder.
        holder: u64,
    },
}

/// What a VMM answers to a [`VcpuQuestion`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum VcpuAnswer {
    /// A page of the vCPUs.
    Registers {
        /// Their registers, in the order of their numbers.
        vcpus: Vec<VcpuRegisters>,
        /// Whether there are more.
        more: bool,
    },
    /// The vCPUs are stopped.
    Paused {
        /// Whether they ran before the first holder's pause.
        was_running: bool,
    },
    /// The holder's pause has ended.
    Resumed,
    /// The holder's pause had ended before.
    NotPaused,
    /// It was not done.
    Failed {
        /// Why, in words.
        message: String,
    },
}
