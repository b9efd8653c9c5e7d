// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The reset vector: where a kernel jumps that wants the BIOS to reset the machine.
//!
//! Linux does so on a hardware-reduced ACPI machine without EFI: it prefers EFI's reset to the
//! reset register there (`reboot_init` in arch/x86/kernel/reboot.c), and falls back to the BIOS's.

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

use super::layout::RESET_VECTOR;
use crate::machine::devices::power;

/// Writes the code that resets the machine by its reset register.
///
/// # Errors
/// When RAM ends before it.
pub(crate) fn write_reset_vector(memory: &GuestMemoryMmap) -> Result<(), GuestMemoryError> {
    let [low, high] = power::RESET_PORT.to_le_bytes();
    // mov dl, low; mov dh, high; mov al, RESET_VALUE; out dx, al; here: hlt; jmp here. The same in
    // any mode.
    let code = [0xb2, low, 0xb6, high, 0xb0, power::RESET_VALUE, 0xee, 0xf4, 0xeb, 0xfd];
    memory.write_slice(&code, GuestAddress(RESET_VECTOR))
}
