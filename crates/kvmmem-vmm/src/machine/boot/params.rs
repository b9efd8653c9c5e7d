// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The boot parameters ("zero page", Documentation/arch/x86/zero-page.rst).

use linux_loader::configurator::linux::LinuxBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::layout::{ACPI_TABLES, CMDLINE, FIRMWARE_END, HIGH_MEMORY, LOW_MEMORY_END, ZERO_PAGE};
use super::loader::LoadedKernel;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

/// Writes the boot parameters for `kernel` and returns their GPA, which the boot CPU finds in rsi.
/// `rsdp` and `seed` are the GPAs of the firmware tables and of the first `setup_data`.
///
/// # Errors
/// When RAM ends before the zero page.
pub(crate) fn write_params(
    kernel: &LoadedKernel,
    rsdp: u64,
    seed: u64,
    memory: &GuestMemoryMmap,
) -> Result<u64, linux_loader::configurator::Error> {
    /// "undefined boot loader", as the protocol has it for those without a number.
    const LOADER_UNDEFINED: u8 = 0xff;
    const BOOT_FLAG: u16 = 0xaa55;
    const HDRS: u32 = 0x5372_6448;
    const KERNEL_ALIGNMENT: u32 = 0x0100_0000;

    let mut params = boot_params { hdr: kernel.header, acpi_rsdp_addr: rsdp, ..Default::default() };
    if params.hdr.header == 0 {
        // An ELF image has no header: say what a loader would have found in the bzImage around it.
        params.hdr.header = HDRS;
        params.hdr.boot_flag = BOOT_FLAG;
        params.hdr.kernel_alignment = KERNEL_ALIGNMENT;
    }
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.setup_data = seed;
    params.hdr.cmd_line_ptr = low_dword(CMDLINE.0);
    params.hdr.cmdline_size = kernel.cmdline_len;
    if let Some((address, size)) = kernel.initrd {
        params.hdr.ramdisk_image = low_dword(address);
        params.hdr.ramdisk_size = size;
    }
    let map = memory_map(memory);
    for (entry, slot) in map.iter().zip(params.e820_table.iter_mut()) {
        *slot = *entry;
    }
    params.e820_entries = u8::try_from(map.len().min(params.e820_table.len())).unwrap_or(0);
    LinuxBootConfigurator::write_bootparams(&BootParams::new(&params, ZERO_PAGE), memory)?;
    Ok(ZERO_PAGE.0)
}

/// Everything that the boot parameters point at lies below 4 GiB.
fn low_dword(address: u64) -> u32 {
    u32::try_from(address).unwrap_or(0)
}

/// RAM up to the tables' area, that area reserved, RAM from 1 MiB and behind the PCI hole.
fn memory_map(memory: &GuestMemoryMmap) -> Vec<boot_e820_entry> {
    let entry = |addr, size, kind| boot_e820_entry { addr, size, r#type: kind };
    let mut map = vec![
        entry(0, LOW_MEMORY_END, E820_RAM),
        entry(ACPI_TABLES.0, FIRMWARE_END - ACPI_TABLES.0, E820_RESERVED),
    ];
    for region in memory.iter() {
        let (start, end) =
            (region.start_addr().0.max(HIGH_MEMORY.0), region.start_addr().0 + region.len());
        if end > start {
            map.push(entry(start, end - start, E820_RAM));
        }
    }
    map
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;

    #[test]
    fn the_memory_map_leaves_the_holes() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[
            (GuestAddress(0), 0x800_0000),
            (GuestAddress(1 << 32), 0x1000),
        ])
        .unwrap();
        let map: Vec<(u64, u64, u32)> = memory_map(&memory)
            .iter()
            .map(|entry| (entry.addr, entry.size, entry.r#type))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, E820_RAM),
                (0xe_0000, 0x2_0000, E820_RESERVED),
                (0x10_0000, 0x7f0_0000, E820_RAM),
                (1 << 32, 0x1000, E820_RAM)
            ]
        );
    }

    #[test]
    fn the_zero_page_says_where_everything_is() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap();
        let kernel = LoadedKernel {
            entry: 0,
            initrd: Some((0x1f_0000, 77)),
            cmdline_len: 3,
            ..Default::default()
        };
        let at = write_params(&kernel, 0xe_0000, 0x1_0000, &memory).unwrap();
        let params: boot_params = memory.read_obj(GuestAddress(at)).unwrap();
        let header = params.hdr;
        assert_eq!((header.ramdisk_image, header.ramdisk_size), (0x1f_0000, 77));
        assert_eq!(
            (header.cmd_line_ptr, header.cmdline_size, header.type_of_loader),
            (0x2_0000, 3, 0xff)
        );
        assert_eq!((params.acpi_rsdp_addr, params.e820_entries), (0xe_0000, 3));
    }
}
