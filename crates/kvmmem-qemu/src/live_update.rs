// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The QEMU that continues a VM when another one stops: QEMU's live update (CPR) hands the RAM's
//! very files to a new process on the same host, which was started with `-incoming`. A VM that
//! migrates to another host has no such process.

use std::collections::HashSet;
use std::io;
use std::path::PathBuf;

use kvmmem_proto::map::Region;

use super::file_id::FileId;
use super::mapping::Mapping;
use super::process::Process;
use super::recognise::recognise;
use super::unix_socket::{Full, LIMIT, look_up};
use super::vmm::Vmm;

/// Finds for each VM the QEMU that has all these parts of files mapped as RAM of its own; none of
/// the processes `others`, which have other VMs or look at these. No QEMU is found twice, and none
/// for a VM without such parts.
///
/// A process that has no right to be taken for it gains nothing: it has mapped the files, and with
/// them the VM's memory.
pub fn find(vms: &[Vec<(FileId, Region)>], others: &HashSet<u32>) -> Vec<Option<Process>> {
    let pids = || {
        let entries = std::fs::read_dir("/proc").into_iter().flatten();
        entries.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
    };
    find_among(vms, others, pids, |pid| {
        // Who reads a process's command line waits for its memory's lock, which a process may hold
        // for ever. It must keep no other VM's end from being noticed.
        let path = PathBuf::from(format!("/proc/{pid}"));
        let none = || io::Error::from(io::ErrorKind::NotFound);
        look_up(&path, LIMIT, Full::Fail, move |_| candidate(pid).ok_or_else(none)).ok()
    })
}

/// Looks at each process once, for all VMs, and at none where no VM has RAM to hand over.
fn find_among<P: Iterator<Item = u32>>(
    vms: &[Vec<(FileId, Region)>],
    others: &HashSet<u32>,
    pids: impl FnOnce() -> P,
    candidate: impl Fn(u32) -> Option<(Process, Vec<Mapping>)>,
) -> Vec<Option<Process>> {
    let mut found: Vec<Option<Process>> = vms.iter().map(|_| None).collect();
    let mut left = vms.iter().filter(|ram| !ram.is_empty()).count();
    if left == 0 {
        return found;
    }
    for pid in pids().filter(|pid| !others.contains(pid)) {
        let Some((process, mappings)) = candidate(pid) else { continue };
        let has = |(file, region): &(FileId, Region)| {
            mappings.iter().any(|mapping| holds(mapping, *file, region))
        };
        let is_its = |(ram, found): (&Vec<_>, &Option<Process>)| {
            found.is_none() && !ram.is_empty() && ram.iter().all(has)
        };
        let Some(place) = vms.iter().zip(&found).position(is_its) else { continue };
        // A process that has ended is not the new QEMU: its number may be another process's by now.
        if process.is_alive()
            && let Some(place) = found.get_mut(place)
        {
            *place = Some(process);
            left -= 1;
            if left == 0 {
                break;
            }
        }
    }
    found
}

/// A QEMU that was started to have a VM come, and what it has mapped.
fn candidate(pid: u32) -> Option<(Process, Vec<Mapping>)> {
    let process = Process::open(pid).ok()?;
    let arguments = process.arguments().ok()?;
    let is_incoming = arguments.iter().any(|word| word == "-incoming" || word == "--incoming");
    if !is_incoming
        || recognise(&process, &process.program().ok()?, &arguments).ok()? != Some(Vmm::Qemu)
    {
        return None;
    }
    let mappings = process.mappings().ok()?;
    Some((process, mappings))
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
    fn the_processes_are_looked_through_once_for_all_vms_or_not_at_all() {
        use std::cell::Cell;
        let others = HashSet::new();
        let walks = Cell::new(0);
        let pids = || {
            walks.set(walks.get() + 1);
            [std::process::id()].into_iter()
        };
        // Private RAM is in no file that another process could have.
        assert!(
            find_among(&vec![Vec::new(); 100], &others, pids, candidate)
                .iter()
                .all(Option::is_none)
        );
        assert_eq!(walks.get(), 0);
        let ram = vec![(
            FileId { device: 1, inode: 7 },
            Region { gpa: 0, len: 0x1000, offset: 0, file: 0 },
        )];
        let found = find_among(&vec![ram; 100], &others, pids, candidate);
        // This process has not been started to have a VM come.
        assert!(found.len() == 100 && found.iter().all(Option::is_none));
        assert_eq!(walks.get(), 1);
    }
}
