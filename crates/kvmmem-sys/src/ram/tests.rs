// SPDX-License-Identifier: Apache-2.0 OR MIT
//! RAM of a guest, and what maps it.

use std::os::unix::fs::FileExt;

use vm_memory::Bytes;

use super::*;

const MIB: u64 = 1 << 20;

#[test]
fn ram_leaves_the_hole() {
    assert_eq!(layout(MIB), [RamRegion { gpa: 0, len: MIB }]);
    assert_eq!(layout(HOLE_START), [RamRegion { gpa: 0, len: HOLE_START }]);
    let parts = [RamRegion { gpa: 0, len: HOLE_START }, RamRegion { gpa: HOLE_END, len: 4096 }];
    assert_eq!(layout(HOLE_START + 4096), parts);
    let ram = GuestRam::new(HOLE_START + 4096).unwrap();
    assert_eq!(ram.regions(), parts);
    assert!(ram.is_page(HOLE_END) && !ram.is_page(HOLE_END + 4096) && !ram.is_page(HOLE_START));
    assert!(!ram.is_page(1));
}

#[test]
fn bad_sizes_are_refused() {
    for bytes in [0, 1, 4095, u64::MAX, 1 << 63] {
        assert!(matches!(GuestRam::new(bytes), Err(RamError::Size { .. })), "{bytes:#x}");
    }
}

#[test]
fn a_page_is_replaced_and_restored() {
    let ram = GuestRam::new(MIB).unwrap();
    let other = GuestRam::new(MIB).unwrap();
    let at = GuestAddress(0x3000);
    ram.memory().write_obj(0x11u64, at).unwrap();
    other.memory().write_obj(0x22u64, GuestAddress(0x5000)).unwrap();

    ram.replace_page(0x3000, other.fd(), 0x5000).unwrap();
    assert_eq!(ram.memory().read_obj::<u64>(at).unwrap(), 0x22);
    ram.memory().write_obj(0x33u64, at).unwrap();
    assert_eq!(other.memory().read_obj::<u64>(GuestAddress(0x5000)).unwrap(), 0x33);

    ram.restore_page(0x3000).unwrap();
    assert_eq!(ram.memory().read_obj::<u64>(at).unwrap(), 0x11);
    ram.punch_page(0x3000).unwrap();
    assert_eq!(ram.memory().read_obj::<u64>(at).unwrap(), 0);
    assert!(matches!(ram.replace_page(0x3001, other.fd(), 0), Err(RamError::NoPage { .. })));
    assert!(matches!(ram.replace_page(MIB, other.fd(), 0), Err(RamError::NoPage { .. })));
    assert!(matches!(ram.replace_page(0x3000, other.fd(), 1), Err(RamError::Replace { .. })));
}

/// The flags of the mapping that holds an address (`VmFlags` of proc(5)'s smaps).
fn flags(address: usize) -> String {
    let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let mut is_it = false;
    for line in maps.lines() {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        if let Some((start, end)) = range
            && let (Ok(start), Ok(end)) =
                (usize::from_str_radix(start, 16), usize::from_str_radix(end, 16))
        {
            is_it = (start..end).contains(&address);
        } else if let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| is_it) {
            return flags.to_owned();
        }
    }
    panic!("{address:#x} is not mapped");
}

#[test]
fn no_guest_s_memory_gets_into_a_core_dump() {
    let (ram, other) = (GuestRam::new(MIB).unwrap(), GuestRam::new(MIB).unwrap());
    let start = ram.memory().iter().next().unwrap().as_ptr().addr();
    let is_left_out = || flags(start + 0x3000).split(' ').any(|flag| flag == "dd");
    assert!(is_left_out(), "own");
    ram.replace_page(0x3000, other.fd(), 0x5000).unwrap();
    assert!(is_left_out(), "replaced");
    ram.restore_page(0x3000).unwrap();
    assert!(is_left_out(), "restored");
}

#[test]
fn the_file_is_sealed_and_offsets_are_gpas() {
    let ram = GuestRam::new(MIB).unwrap();
    let file = File::from(ram.fd().try_clone_to_owned().unwrap());
    assert!(file.set_len(0).is_err());
    assert!(rustix::fs::fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).is_err());
    file.write_all_at(&[7], 0x4567).unwrap();
    assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0x4567)).unwrap(), 7);
    ram.zero().unwrap();
    assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0x4567)).unwrap(), 0);
}

#[test]
fn a_huge_page_never_takes_a_page_s_place() {
    use crate::huge::tests::huge_file;
    let Some(file) = huge_file(1) else { return };
    let ram = GuestRam::new(8 * MIB).unwrap();
    // Where the kernel would round the page's length up and take 2 MiB of the guest's memory.
    for gpa in (0..8 * MIB).step_by(4096) {
        let replaced = ram.replace_page(gpa, file.as_fd(), 0);
        assert!(
            matches!(replaced, Err(RamError::HugePages { page: 0x20_0000, .. })),
            "{replaced:?}"
        );
    }
}

#[test]
fn a_file_that_refuses_takes_no_page_s_place() {
    let ram = GuestRam::new(MIB).unwrap();
    ram.memory().write_obj(7u8, GuestAddress(0x3000)).unwrap();
    let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
    let replaced = ram.replace_page(0x3000, socket.as_fd(), 0);
    assert!(matches!(replaced, Err(RamError::Replace { gpa: 0x3000, .. })), "{replaced:?}");
    assert_eq!(ram.memory().read_obj::<u8>(GuestAddress(0x3000)).unwrap(), 7);
}
