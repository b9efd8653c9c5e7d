// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where the guest-physical memory of a QEMU PC lies in its memory backends.
//!
//! Either QEMU says it, or the rules of the machine type do: RAM begins at 0, extends at most to 4
//! GiB less a hole, and the rest begins at 4 GiB; the backends of several NUMA nodes follow each
//! other. How much is below the hole is decided by `pc_init1` in QEMU's `hw/i386/pc_piix.c` and by
//! `pc_q35_init` in `hw/i386/pc_q35.c`, the same in QEMU 2.4 to 11.1.
//!
//! From 0xa0000 to 0xc0000 is the VGA's window, which hides SMRAM: it is left out. From there to
//! 1 MiB the chipset lays ROM over RAM and takes it away again, in pieces and at any time; what
//! counts here is the RAM.

use kvmmem_proto::map::{MAX_FILES, PAGE_SIZE, Region};

use super::mtree::FlatRange;
use super::vmm::Vmm;
use crate::qmp::questions::{MemoryBackend, MemoryDevice, MemorySize};

/// Where the RAM above the hole begins.
const FOUR_GIB: u64 = 1 << 32;

/// Where low RAM ends at most without a chipset's rules: `MEM_32BIT_RESERVED_START` in Cloud
/// Hypervisor's `arch/src/x86_64/layout.rs`, `MMIO32_MEM_START` in Firecracker's
/// `src/vmm/src/arch/x86_64/layout.rs`.
const MICRO_LOW: u64 = 3 << 30;

/// The same in Firecracker up to 1.12, whose `MMIO_MEM_START` leaves a hole of 768 MiB.
const FIRECRACKER_LOW: u64 = 3328 << 20;

/// The window of the VGA, and the end of what the chipset covers with ROM.
const VGA: u64 = 0xa_0000;
const ROM: u64 = 0xc_0000;
const ROM_END: u64 = 0x10_0000;

/// On AMD hosts QEMU moves what is above 4 GiB where it would reach the addresses that
/// HyperTransport has near 1 TiB.
const MAX_BY_RULES: u64 = 900 << 30;

/// Why it is not known where the RAM lies.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// There are no rules for the machine.
    #[error("no rules are known for machine type {0:?}; give QEMU's QMP socket")]
    Machine(String),
    /// RAM could have been plugged in since.
    #[error("RAM may have been plugged in since the start (maxmem, DIMMs); give QEMU's QMP socket")]
    Growable,
    /// The command line does not say which NUMA node has what.
    #[error("what RAM the NUMA nodes have is not on the command line; give QEMU's QMP socket")]
    Nodes,
    /// It is not known how much RAM there is.
    #[error(
        "how much RAM there is stands neither on the command line nor does the VMM's API tell it"
    )]
    Size,
    /// It is too much for the rules.
    #[error("{0:#x} bytes of RAM are too many for the rules; give QEMU's QMP socket")]
    Large(u64),
    /// RAM is not in a memory backend, or QEMU has no backend of that name.
    #[error("QEMU has no memory backend {0:?} with RAM in it")]
    NoBackend(String),
    /// The backends do not make up the RAM.
    #[error(
        "of {all:#x} bytes of RAM from the start {found:#x} are in memory backends that are known; start QEMU with its NUMA nodes on the command line"
    )]
    Incomplete {
        /// RAM from the start, bytes.
        all: u64,
        /// In known backends, bytes.
        found: u64,
    },
    /// Memory of a device comes and goes in parts, which only the guest is told of.
    #[error("RAM is in a device of kind {0:?}, whose parts come and go")]
    Device(String),
    /// A backend has nothing but what the VGA's window hides.
    #[error("memory backend number {0} has no page of RAM")]
    NoRegion(u32),
    /// RAM is in too many backends.
    #[error("RAM is in {0} memory backends, at most {MAX_FILES} are supported")]
    TooMany(usize),
}

/// RAM as the machine has it. In each region `file` is the number of a backend, and `offset` the
/// place in that.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Where it lies.
    pub regions: Vec<Region>,
    /// The sizes of the backends, bytes.
    pub sizes: Vec<u64>,
}

/// The end of low RAM by the rules of a machine type, for `size` bytes in all.
pub fn low_end(machine: &str, size: u64, max_below_4g: Option<u64>) -> Result<u64, LayoutError> {
    if size > MAX_BY_RULES {
        return Err(LayoutError::Large(size));
    }
    let low = if machine == "q35" || machine.starts_with("pc-q35-") {
        let low: u64 = if size >= 0xb000_0000 { 0x8000_0000 } else { 0xb000_0000 };
        low.min(max_below_4g.unwrap_or(FOUR_GIB))
    } else if machine == "pc" || machine.starts_with("pc-i440fx-") {
        let low = max_below_4g.unwrap_or(0xe000_0000);
        if size >= low { low.min(0xc000_0000) } else { low }
    } else {
        return Err(LayoutError::Machine(machine.to_owned()));
    };
    Ok(low.min(size))
}

/// The layout of RAM whose first `low` bytes are below 4 GiB, in backends of these sizes.
pub fn by_rules(low: u64, sizes: Vec<u64>) -> Layout {
    let mut start = 0u64;
    let mut regions = Vec::new();
    for (file, size) in (0..).zip(&sizes) {
        let end = start.saturating_add(*size);
        let split = low.clamp(start, end);
        regions.push(Region { gpa: start, len: split - start, offset: 0, file });
        let gpa = FOUR_GIB.saturating_add(split.saturating_sub(low));
        regions.push(Region { gpa, len: end - split, offset: split - start, file });
        start = end;
    }
    regions.sort_by_key(|region| region.gpa);
    Layout { regions: outside_of_vga(regions), sizes }
}

/// The layouts that `size` bytes of RAM have under a VMM without a chipset, by its versions. Low
/// RAM ends at a hole, the rest is a part of its own.
pub fn of_micro(vmm: Vmm, size: u64) -> Vec<Layout> {
    let in_two = |hole: u64| {
        let low = size.min(hole);
        by_rules(low, if size > low { vec![low, size - low] } else { vec![low] })
    };
    let mut layouts = vec![in_two(MICRO_LOW)];
    if vmm == Vmm::Firecracker && size > MICRO_LOW {
        layouts.push(in_two(FIRECRACKER_LOW));
    }
    layouts
}

/// The layout that QEMU says. `nodes` are the ids of the backends that the command line gives NUMA
/// nodes; where there are none, all RAM from the start is in the backend at address 0.
///
/// Only what is RAM counts: other devices have memory backends too, whose memory may be other VMs'.
pub fn from_qemu(
    view: &[FlatRange],
    backends: &[MemoryBackend],
    devices: &[MemoryDevice],
    memory: MemorySize,
    nodes: &[String],
) -> Result<Layout, LayoutError> {
    let first = view.iter().find(|range| range.gpa == 0 && range.is_memory);
    let name = first.map(|range| range.name.clone()).unwrap_or_default();
    let single = [last_word(&name).to_owned()];
    let base = if nodes.is_empty() { &single } else { nodes };
    let size = |id: &str| {
        let found = backends.iter().find(|backend| backend.id.as_deref() == Some(id));
        found.map(|backend| backend.size).ok_or_else(|| LayoutError::NoBackend(id.to_owned()))
    };
    let found =
        base.iter().try_fold(0u64, |sum, id| size(id).map(|size| sum.saturating_add(size)))?;
    if found != memory.base_memory {
        return Err(LayoutError::Incomplete { all: memory.base_memory, found });
    }
    let mut ids: Vec<&str> = base.iter().map(String::as_str).collect();
    for device in devices {
        match device.kind.as_str() {
            "dimm" => ids.push(last_word(device.data.memdev.as_deref().unwrap_or_default())),
            // Storage, and what the CPU encrypts.
            "nvdimm" | "virtio-pmem" | "sgx-epc" => {}
            other => return Err(LayoutError::Device(other.to_owned())),
        }
    }
    if ids.len() > MAX_FILES {
        return Err(LayoutError::TooMany(ids.len()));
    }
    let sizes = ids.iter().map(|id| size(id)).collect::<Result<_, _>>()?;
    let region = |range: &FlatRange| {
        let number = ids.iter().position(|id| *id == last_word(&range.name))?;
        let file = u32::try_from(number).ok()?;
        Some(Region { gpa: range.gpa, len: range.len, offset: range.offset, file })
    };
    let regions: Vec<Region> =
        view.iter().filter(|range| range.is_memory).filter_map(region).collect();
    for (id, file) in ids.iter().zip(0..) {
        if !regions.iter().any(|region| region.file == file) {
            return Err(LayoutError::NoBackend((*id).to_owned()));
        }
    }
    Ok(Layout { regions: outside_of_vga(regions), sizes })
}

/// A backend's id: its memory has that name, or a path that ends in it.
fn last_word(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or_default()
}

/// Whole pages of the regions but for the VGA's window; RAM also where the chipset has laid ROM
/// over it.
fn outside_of_vga(regions: Vec<Region>) -> Vec<Region> {
    let plain = |gpa: u64| {
        regions.iter().find(|r| r.gpa == r.offset && (r.gpa..r.gpa + r.len).contains(&gpa))
    };
    let covered =
        plain(VGA - 1).zip(plain(ROM_END)).filter(|(below, above)| below.file == above.file);
    let below = regions.iter().filter_map(|region| cut(region, 0, VGA));
    let rom =
        covered.map(|(below, _)| Region { gpa: ROM, len: ROM_END - ROM, offset: ROM, ..*below });
    let above = regions.iter().filter_map(|region| cut(region, ROM_END, u64::MAX));
    let mut joined: Vec<Region> = Vec::new();
    for region in below.chain(rom).chain(above) {
        match joined.last_mut() {
            Some(last)
                if (last.gpa + last.len, last.offset + last.len, last.file)
                    == (region.gpa, region.offset, region.file) =>
            {
                last.len += region.len;
            }
            _ => joined.push(region),
        }
    }
    joined
}

/// The whole pages of a region between two addresses.
fn cut(region: &Region, start: u64, end: u64) -> Option<Region> {
    let gpa = region.gpa.max(start).checked_next_multiple_of(PAGE_SIZE)?;
    let end = region.gpa.checked_add(region.len)?.min(end) / PAGE_SIZE * PAGE_SIZE;
    let len = end.checked_sub(gpa).filter(|len| *len > 0)?;
    Some(Region { gpa, len, offset: region.offset.checked_add(gpa - region.gpa)?, ..*region })
}

#[cfg(test)]
mod tests;
