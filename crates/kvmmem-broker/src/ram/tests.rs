// SPDX-License-Identifier: Apache-2.0 OR MIT
//! RAM in files, of a process, and what is none.

use kvmmem_proto::map::MapError;

use super::*;
use crate::test_wait::wait_for;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};

fn memfd(size: u64, seals: SealFlags) -> OwnedFd {
    let fd = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    ftruncate(&fd, size).unwrap();
    fcntl_add_seals(&fd, seals).unwrap();
    fd
}

fn regions() -> Vec<Region> {
    vec![
        Region { gpa: 0, len: 0x2000, offset: 0, file: 0 },
        Region { gpa: 0x10_0000, len: 0x1000, offset: 0x10_0000, file: 0 },
    ]
}

#[test]
fn memory_is_read_and_written_but_for_holes() {
    let ram = Ram::new(vec![memfd(0x10_1000, SealFlags::SHRINK)], regions()).unwrap();
    ram.write(0x10_0ffd, b"abc").unwrap();
    let mut bytes = [1; 4];
    ram.read(0x10_0ffc, &mut bytes).unwrap();
    assert_eq!(&bytes, b"\0abc");
    assert_eq!(ram.read(0x2000, &mut bytes), Err(AccessError::Hole(0x2000)));
    assert_eq!(ram.write(0x10_1000, &bytes), Err(AccessError::Hole(0x10_1000)));
}

#[test]
fn a_changed_map_counts_at_once() {
    let ram = Ram::new(vec![memfd(0x10_1000, SealFlags::SHRINK)], regions()).unwrap();
    ram.write(0x10_0000, b"x").unwrap();
    let first = ram.layout().generation;
    ram.change(vec![Region { gpa: 0x8000, len: 0x1000, offset: 0x10_0000, file: 0 }]).unwrap();
    let mut byte = [0];
    ram.read(0x8000, &mut byte).unwrap();
    assert_eq!((&byte, ram.layout().generation), (b"x", first + 1));
    assert_eq!(ram.read(0x10_0000, &mut byte), Err(AccessError::Hole(0x10_0000)));
    let beyond = vec![Region { gpa: 0, len: 0x1000, offset: 0x10_1000, file: 0 }];
    assert!(matches!(ram.change(beyond), Err(RamError::Small { .. })));
    assert!(matches!(ram.change(vec![]), Err(RamError::Map(MapError::Empty))));
    assert_eq!(ram.layout().generation, first + 1);
}

#[test]
fn a_new_registration_has_a_higher_generation() {
    let old = Ram::new(vec![memfd(0x10_1000, SealFlags::SHRINK)], regions()).unwrap();
    old.change(regions()).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(1));
    let new = Ram::new(vec![memfd(0x10_1000, SealFlags::SHRINK)], regions()).unwrap();
    assert!(new.layout().generation > old.layout().generation);
}

#[test]
fn a_read_only_descriptor_cannot_write() {
    let ram = Ram::new(vec![memfd(0x10_1000, SealFlags::SHRINK)], regions()).unwrap();
    ram.write(0, b"stripes").unwrap();
    let files = ram.open_read_only().unwrap();
    let [fd] = files.as_slice() else { panic!("{files:?}") };
    let mut bytes = [0; 7];
    rustix::io::pread(fd, &mut bytes, 0).unwrap();
    assert_eq!(&bytes, b"stripes");
    assert_eq!(rustix::io::pwrite(fd, b"x", 0), Err(Errno::BADF));
}

#[test]
fn each_region_is_read_in_its_file() {
    let node = |gpa, file| Region { gpa, len: 0x2000, offset: 0, file };
    let files = || vec![memfd(0x2000, SealFlags::SHRINK), memfd(0x2000, SealFlags::SHRINK)];
    let ram = Ram::new(files(), vec![node(0, 0), node(0x2000, 1)]).unwrap();
    ram.write(0x1000, b"first").unwrap();
    ram.write(0x3000, b"second").unwrap();
    let mut bytes = [0; 6];
    rustix::io::pread(ram.files()[1], &mut bytes, 0x1000).unwrap();
    assert_eq!(&bytes, b"second");
    ram.change(vec![node(0, 1), node(0x2000, 0)]).unwrap();
    ram.read(0x1000, &mut bytes).unwrap();
    assert_eq!(&bytes, b"second");
    // One of them may go, but none come.
    ram.change(vec![node(0, 0)]).unwrap();
    let third = ram.change(vec![node(0, 2)]);
    assert!(matches!(third, Err(RamError::Count { found: 2, needed: 3 })), "{third:?}");
    for regions in [vec![node(0, 0)], vec![node(0, 2)]] {
        assert!(matches!(Ram::new(files(), regions), Err(RamError::Count { found: 2, .. })));
    }
    let small = Ram::new(files(), vec![node(0, 0), Region { len: 0x3000, ..node(0x2000, 1) }]);
    assert!(matches!(small, Err(RamError::Small { size: 0x2000, needed: 0x3000 })));
}

#[test]
fn one_file_in_common_is_enough_to_overlap() {
    let node = |gpa, file| Region { gpa, len: 0x2000, offset: 0, file };
    let two = || {
        Ram::new(
            vec![memfd(0x2000, SealFlags::SHRINK), memfd(0x2000, SealFlags::SHRINK)],
            vec![node(0, 0), node(0x2000, 1)],
        )
        .unwrap()
    };
    let (ram, other) = (two(), two());
    assert!(ram.overlaps(&ram).unwrap() && !ram.overlaps(&other).unwrap());
    let second = ram.duplicate().unwrap().pop().unwrap();
    let part = Ram::new(vec![second], vec![node(0, 0)]).unwrap();
    assert!(part.overlaps(&ram).unwrap() && ram.overlaps(&part).unwrap());
    assert!(!part.overlaps(&other).unwrap());
}

#[test]
fn what_is_no_ram_is_refused() {
    let null = std::fs::File::open("/dev/null").unwrap();
    assert!(matches!(Ram::new(vec![null.into()], regions()), Err(RamError::NotMemfd(_))));
    assert!(matches!(
        Ram::new(vec![memfd(0x10_1000, SealFlags::GROW)], regions()),
        Err(RamError::Unsealed)
    ));
    assert!(matches!(
        Ram::new(vec![memfd(0x10_1000, SealFlags::SHRINK | SealFlags::WRITE)], regions()),
        Err(RamError::ReadOnly)
    ));
    assert!(matches!(
        Ram::new(vec![memfd(0x10_0fff, SealFlags::SHRINK)], regions()),
        Err(RamError::Small { size: 0x10_0fff, needed: 0x10_1000 })
    ));
    assert!(matches!(
        Ram::new(vec![memfd(0, SealFlags::SHRINK)], vec![]),
        Err(RamError::Map(MapError::Empty))
    ));
    let file = tempfile::tempfile().unwrap();
    file.set_len(0x10_1000).unwrap();
    assert!(matches!(
        Ram::new(vec![file.into()], regions()),
        Err(RamError::NotMemfd(_) | RamError::Unsealed)
    ));
}

/// Memory of this process that nothing else uses, and where in it whole pages begin.
fn own_memory(len: usize) -> (Vec<u8>, u64) {
    let memory = vec![0; len + 0x1000];
    let start = memory.as_ptr().expose_provenance().next_multiple_of(0x1000);
    (memory, start as u64)
}

fn memory_of(pid: u32) -> OwnedFd {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open(format!("/proc/{pid}/mem"), flags, Mode::empty()).unwrap()
}

fn private(gpa: u64, len: u64, hva: u64) -> Region {
    Region { gpa, len, offset: hva, file: 0 }
}

/// The stack of a process: where it begins, and how long it is.
fn stack_of(pid: u32) -> (u64, u64) {
    let maps = std::fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let line = maps.lines().find(|line| line.ends_with("[stack]")).unwrap();
    let (start, end) = line.split_whitespace().next().unwrap().split_once('-').unwrap();
    let number = |digits| u64::from_str_radix(digits, 16).unwrap();
    (number(start), number(end) - number(start))
}

#[test]
fn private_ram_is_copied_at_the_vmms_addresses() {
    let (memory, hva) = own_memory(0x8000);
    let regions = vec![private(0, 0x2000, hva + 0x4000), private(0x10_0000, 0x1000, hva)];
    let ram = Ram::of_process(memory_of(std::process::id()), regions).unwrap();
    assert!(ram.is_private() && ram.files().is_empty() && ram.duplicate().unwrap().is_empty());
    ram.write(0xffe, b"stripes").unwrap();
    ram.write(0x10_0ffd, b"end").unwrap();
    let mut bytes = [0; 7];
    ram.read(0xffe, &mut bytes).unwrap();
    assert_eq!(&bytes, b"stripes");
    // What is told to others has none of the VMM's addresses.
    let told = [private(0, 0x2000, 0), private(0x10_0000, 0x1000, 0x10_0000)];
    assert_eq!(ram.layout().regions(), told);
    // As far as there is memory.
    assert_eq!(ram.write(0x10_0ffd, b"ending"), Err(AccessError::Hole(0x10_1000)));
    assert!(
        ram.overlaps(&Ram::of_process(memory_of(std::process::id()), told_at(hva)).unwrap())
            .unwrap()
    );
    drop(ram);
    let at = usize::try_from(hva).unwrap() - memory.as_ptr().addr();
    assert_eq!(
        (&memory[at + 0x4ffe..][..7], &memory[at + 0xffd..][..3]),
        (b"stripes".as_slice(), b"end".as_slice())
    );
}

fn told_at(hva: u64) -> Vec<Region> {
    vec![private(0, 0x1000, hva)]
}

#[test]
fn what_is_no_process_s_memory_is_refused() {
    let (_memory, hva) = own_memory(0x2000);
    let own = || memory_of(std::process::id());
    let read_only = std::fs::File::open("/proc/self/mem").unwrap().into();
    let tried = Ram::of_process(read_only, told_at(hva));
    assert!(matches!(tried, Err(RamError::NotMemory)), "{tried:?}");
    let tried = Ram::of_process(memfd(0x10_1000, SealFlags::SHRINK), told_at(0));
    assert!(matches!(tried, Err(RamError::NotMemory)), "{tried:?}");
    let tried = Ram::of_process(own(), told_at(0));
    assert!(matches!(tried, Err(RamError::Unmapped { gpa: 0, hva: 0 })), "{tried:?}");
    let second = vec![Region { file: 1, ..private(0, 0x1000, hva) }];
    assert!(matches!(Ram::of_process(own(), second), Err(RamError::Count { found: 1, needed: 2 })));
    // And what is a process's memory is no memfd.
    assert!(matches!(Ram::new(vec![own()], told_at(hva)), Err(RamError::NotMemfd(_))));
}

#[test]
fn memory_that_the_vmm_unmaps_is_an_error() {
    const LEN: usize = 256 << 20;
    let (memory, hva) = own_memory(LEN);
    let ram =
        Ram::of_process(memory_of(std::process::id()), vec![private(0, LEN as u64, hva)]).unwrap();
    ram.read(LEN as u64 / 2, &mut [0; 8]).unwrap();
    drop(memory);
    let gone = Err(AccessError::System { gpa: LEN as u64 / 2, source: Errno::IO });
    assert_eq!(ram.read(LEN as u64 / 2, &mut [0; 8]), gone);
    assert_eq!(ram.write(LEN as u64 / 2, &[0; 8]), gone);
}

#[test]
fn a_process_that_ends_or_executes_another_program_has_no_memory_left() {
    use std::io::Write;
    use std::process::{Command, Stdio};
    for then in ["exit", "exec cat"] {
        let script = format!("echo ready; read line; {then}");
        let mut child = Command::new("sh")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut ready).unwrap();
        let (hva, len) = stack_of(child.id());
        let ram = Ram::of_process(memory_of(child.id()), vec![private(0, len, hva)]).unwrap();
        ram.read(len - 8, &mut [0; 8]).unwrap();
        let mut stdin = child.stdin.take().unwrap();
        stdin.write_all(b"go\n").unwrap();
        let gone = Err(AccessError::System { gpa: 8, source: Errno::SRCH });
        wait_for(then, || ram.read(8, &mut [0; 8]) == gone);
        assert_eq!(ram.write(8, b"x"), gone);
        drop(stdin);
        child.wait().unwrap();
    }
}

#[test]
fn huge_pages_are_read_and_written() {
    const HUGE: u64 = 2 << 20;
    let flags = MemfdFlags::CLOEXEC
        | MemfdFlags::ALLOW_SEALING
        | MemfdFlags::HUGETLB
        | MemfdFlags::HUGE_2MB;
    let made = memfd_create("huge", flags).and_then(|file| {
        ftruncate(&file, HUGE)?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, HUGE)?;
        fcntl_add_seals(&file, SealFlags::SHRINK)?;
        Ok(file)
    });
    let Ok(file) = made.inspect_err(|error| {
        eprintln!("skipped: no huge page ({error}): sysctl vm.nr_hugepages=16 sets some aside")
    }) else {
        return;
    };
    let ram = Ram::new(vec![file], vec![Region { gpa: 0, len: HUGE, offset: 0, file: 0 }]).unwrap();
    ram.write(0x12_3ffd, b"stripes").unwrap();
    let mut bytes = [0; 7];
    ram.read(0x12_3ffd, &mut bytes).unwrap();
    assert_eq!(&bytes, b"stripes");
    assert_eq!(ram.write(HUGE - 1, b"ab"), Err(AccessError::Hole(HUGE)));
}
