// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The QEMU that goes on with a VM when another one stops: QEMU's live update (CPR) hands the RAM's very files to a new
//! process on the same host, which was started with `-incoming`. A VM that moves elsewhere leaves its files to nobody.

use super::command_line::Vmm;
use super::mapping::Mapping;
use super::process::{FileId, Process};
use crate::map::Region;

/// Finds the QEMU that has all these parts of files mapped as RAM of its own; none of the processes `others`, which have
/// other VMs or look at this one.
///
/// A process that has no right to be taken for it gains nothing: whoever has mapped the files has the VM's memory.
pub(super) fn find(ram: &[(FileId, Region)], others: &[u32]) -> Option<Process> {
    let entries = std::fs::read_dir("/proc").ok()?;
    let pids = entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    pids.filter(|pid| !others.contains(pid)).find_map(|pid| open(pid, ram))
}

fn open(pid: u32, ram: &[(FileId, Region)]) -> Option<Process> {
    let process = Process::open(pid).ok()?;
    let program = process.program().ok()?;
    let arguments = process.arguments().ok()?;
    let is_incoming = arguments.iter().any(|word| word == "-incoming" || word == "--incoming");
    if Vmm::recognise(&program, &arguments) != Some(Vmm::Qemu) || !is_incoming {
        return None;
    }
    let mappings = process.mappings().ok()?;
    let has =
        |(file, region): &(FileId, Region)| mappings.iter().any(|mapping| holds(mapping, *file, region));
    // What ended meanwhile is no successor; its number may be somebody else's by now.
    (!ram.is_empty() && ram.iter().all(has) && process.is_alive()).then_some(process)
}

fn holds(mapping: &Mapping, file: FileId, region: &Region) -> bool {
    let Some((id, start)) = mapping.shared_file() else { return false };
    let end = region.offset.checked_sub(start).and_then(|place| place.checked_add(region.len));
    id == file && end.is_some_and(|end| end <= mapping.len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_must_hold_all_of_a_region_and_be_shared() {
        let file = FileId { device: 1, inode: 7 };
        let mapping = Mapping {
            hva: 0x10_0000,
            len: 0x4000,
            is_shared: true,
            file: Some((file, 0x1000)),
            path: String::new(),
        };
        let region = |offset, len| Region { gpa: 0, len, offset, file: 0 };
        assert!(holds(&mapping, file, &region(0x1000, 0x4000)));
        assert!(holds(&mapping, file, &region(0x2000, 0x1000)));
        for (offset, len) in [(0, 0x1000), (0x1000, 0x5000), (0x5000, 0x1000), (0x2000, u64::MAX)] {
            assert!(!holds(&mapping, file, &region(offset, len)), "{offset:#x} {len:#x}");
        }
        assert!(!holds(&mapping, FileId { inode: 8, ..file }, &region(0x1000, 0x1000)));
        assert!(!holds(&Mapping { is_shared: false, ..mapping }, file, &region(0x1000, 0x1000)));
    }

    #[test]
    fn this_process_takes_over_from_nobody() {
        assert!(open(std::process::id(), &[]).is_none());
        assert!(find(&[], &[]).is_none());
    }
}
