// SPDX-License-Identifier: GPL-2.0-only
//! CPU: CPUID, and which addresses and pages it has.

use core::arch::x86_64::__cpuid;

use kernel::bindings;

/// eax, ebx, ecx, edx of a CPUID leaf.
pub(crate) fn cpuid(leaf: u32) -> [u32; 4] {
    // SAFETY: every x86-64 CPU has the instruction, and it changes nothing but its four registers.
    let result = unsafe { __cpuid(leaf) };
    [result.eax, result.ebx, result.ecx, result.edx]
}

/// Whether the CPU has pages of 1 GiB.
pub(crate) fn has_1g_pages() -> bool {
    const PDPE1GB: u32 = 1 << 26;
    let [highest, ..] = cpuid(0x8000_0000);
    let [.., edx] = cpuid(0x8000_0001);
    highest >= 0x8000_0001 && edx & PDPE1GB != 0
}

/// The first physical address that the CPU cannot have.
pub(super) fn physical_end() -> u64 {
    // SAFETY: written when the CPU was found, long before modules are loaded, and never again.
    let bits = unsafe { bindings::boot_cpu_data.x86_phys_bits };
    1u64.checked_shl(bits.into()).unwrap_or(u64::MAX)
}
