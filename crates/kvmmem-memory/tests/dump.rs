// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Dump files that a builder wrote, damaged ones, and any bytes.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use kvmmem_memory::dump::{Format, Segment};
use kvmmem_memory::paging::ControlRegisters;
use kvmmem_memory::{DumpError, DumpFile, Memory, MemoryError, Range};
use proptest::prelude::*;
use rustix::fs::{FileType, MemfdFlags, Mode};
use tempfile::TempDir;

const MIB: u64 = 1 << 20;

fn range(gpa: u64, len: u64) -> Range {
    Range { gpa, len }
}

fn file(bytes: &[u8]) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dump");
    fs::write(&path, bytes).unwrap();
    (directory, path)
}

/// The bytes of an ELF core: for each segment its address, its bytes and how many more memory has.
fn elf(segments: &[(u64, &[u8], u64)], by_section: bool) -> Vec<u8> {
    let (count, sections) = (segments.len(), usize::from(by_section));
    let headers = 64 + 64 * sections + 56 * count;
    let mut head = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    let words = |head: &mut Vec<u8>, words: &[u64]| {
        head.extend(words.iter().flat_map(|word| word.to_le_bytes()))
    };
    head.extend(4u16.to_le_bytes());
    head.extend(62u16.to_le_bytes());
    head.extend(1u32.to_le_bytes());
    words(&mut head, &[0, 64 + 64 * sections as u64, 64]);
    head.extend(0u32.to_le_bytes());
    let phnum = if by_section { 0xffff } else { u16::try_from(count).unwrap() };
    head.extend(
        [64, 56, phnum, 64, u16::from(by_section), 0]
            .iter()
            .flat_map(|word: &u16| word.to_le_bytes()),
    );
    if by_section {
        let mut section = vec![0; 64];
        section[44..48].copy_from_slice(&u32::try_from(count).unwrap().to_le_bytes());
        head.extend(section);
    }
    let mut offset = headers as u64;
    for (gpa, bytes, more) in segments {
        let len = bytes.len() as u64;
        head.extend([1u32, 7].iter().flat_map(|word| word.to_le_bytes()));
        words(&mut head, &[offset, 0xffff_8880_0000_0000 + gpa, *gpa, len, len + more, 0]);
        offset += len;
    }
    assert_eq!(head.len(), headers);
    segments.iter().for_each(|(_, bytes, _)| head.extend(*bytes));
    head
}

/// A QEMU note, as of version 1 of the structure or of another.
fn qemu_note(registers: ControlRegisters, version: u32) -> Vec<u8> {
    let mut state = vec![0; 440];
    state[..4].copy_from_slice(&version.to_le_bytes());
    state[4..8].copy_from_slice(&440u32.to_le_bytes());
    let ControlRegisters { cr0, cr3, cr4, .. } = registers;
    for (at, value) in [(392, cr0), (416, cr3), (424, cr4)] {
        state[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    note(b"QEMU\0\0\0\0", 5, &state)
}

/// A note with a name that is padded already.
fn note(name: &[u8], name_len: u32, content: &[u8]) -> Vec<u8> {
    let len = u32::try_from(content.len()).unwrap();
    let head = [name_len, len, 0].into_iter().flat_map(u32::to_le_bytes);
    head.chain(name.iter().copied()).chain(content.iter().copied()).collect()
}

/// A core whose first segment is these notes.
fn elf_with_notes(notes: &[u8]) -> Vec<u8> {
    let mut bytes = elf(&[(0, notes, 0), (0x1000, &[1; 0x1000], 0)], false);
    bytes[64..68].copy_from_slice(&4u32.to_le_bytes());
    bytes
}

#[test]
fn the_control_registers_are_those_in_the_qemu_notes() {
    let vcpu = |cr3| ControlRegisters { cr0: 0x8005_0033, cr3, cr4: 0x75_0eb0, efer: None };
    let core = note(b"CORE\0\0\0\0", 5, &[0; 336]);
    let notes = [core.clone(), qemu_note(vcpu(0x1000), 1), qemu_note(vcpu(0x2000), 1)].concat();
    let vcpus = |bytes: &[u8]| {
        let (_directory, path) = file(bytes);
        DumpFile::open(&path).unwrap().vcpus()
    };
    assert_eq!(vcpus(&elf_with_notes(&notes)).unwrap(), [vcpu(0x1000), vcpu(0x2000)]);
    // Those of kdump have none, nor has what is no core.
    assert_eq!(vcpus(&elf_with_notes(&core)).unwrap(), []);
    assert_eq!(vcpus(&elf(&[(0, &[1; 0x1000], 0)], false)).unwrap(), []);
    assert_eq!(vcpus(&lime(&[(0, &[1; 0x1000])])).unwrap(), []);
    assert_eq!(vcpus(&[0; 0x1000]).unwrap(), []);
    let damaged = [&notes[..notes.len() - 8], &qemu_note(vcpu(0), 2)[..], &[0xff; 12]];
    for notes in damaged {
        let error = vcpus(&elf_with_notes(notes)).unwrap_err();
        assert!(
            matches!(error, DumpError::Malformed { what: "its notes make no sense", .. }),
            "{error}"
        );
    }
}

fn lime(ranges: &[(u64, &[u8])]) -> Vec<u8> {
    let mut file = Vec::new();
    for (gpa, bytes) in ranges {
        file.extend(b"EMiL\x01\0\0\0");
        file.extend(
            [*gpa, gpa + bytes.len() as u64 - 1, 0].iter().flat_map(|word| word.to_le_bytes()),
        );
        file.extend(*bytes);
    }
    file
}

#[test]
fn every_format_gives_the_same_bytes() {
    let (low, high): (Vec<u8>, Vec<u8>) =
        ((0..0x30).flat_map(|_| 0..=255).collect(), vec![7; 0x1000]);
    let in_elf = elf(
        &[(0x10_0000, &low[..0x1000], 0), (0x10_1000, &low[0x1000..], 0x5000), (4 << 30, &high, 0)],
        false,
    );
    let by_section = elf(
        &[(4 << 30, &high, 0), (0x10_0000, &low, 0), (0x10_1000, &low[0x1000..0x2000], 0)],
        true,
    );
    let in_lime = lime(&[(0x10_0000, &low), (4 << 30, &high)]);
    for (bytes, format) in
        [(in_elf, Format::Elf), (by_section, Format::Elf), (in_lime, Format::Lime)]
    {
        let (_directory, path) = file(&bytes);
        let dump = DumpFile::open(&path).unwrap();
        assert_eq!(dump.format(), format);
        let ranges = [range(0x10_0000, 0x3000), range(4 << 30, 0x1000)];
        assert_eq!(dump.ranges().unwrap(), ranges);
        let mut bytes = vec![0; 0x1800];
        dump.read_at(0x10_0800, &mut bytes).unwrap();
        assert_eq!(bytes, low[0x800..0x2000]);
        let (mut a, mut b) = ([0; 3], [0; 2]);
        dump.read_vectored(&mut [(0x10_0ffe, &mut a[..]), ((4 << 30) + 0xffe, &mut b[..])])
            .unwrap();
        assert_eq!((a, b), ([0xfe, 0xff, 0], [7, 7]));
        // What the file has no bytes for is a hole.
        let error = dump.read_at(0x10_2fff, &mut [0; 2]).unwrap_err();
        assert!(matches!(error, MemoryError::Hole { gpa: 0x10_3000 }), "{error}");
        let data: u64 = (&dump as &dyn Memory).data().map(|part| part.unwrap().len).sum();
        assert_eq!(data, 0x4000);
    }
}

#[test]
fn holes_of_a_raw_file_have_no_data() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("dump");
    let raw = File::create_new(&path).unwrap();
    raw.set_len(64 * MIB).unwrap();
    raw.write_all_at(b"low", 0).unwrap();
    raw.write_all_at(b"high", 32 * MIB).unwrap();
    let dump = DumpFile::open(&path).unwrap();
    assert_eq!(dump.ranges().unwrap(), [range(0, 64 * MIB)]);
    let data: Vec<Range> = (&dump as &dyn Memory).data().map(Result::unwrap).collect();
    let has = |gpa: u64| data.iter().any(|part| part.gpa <= gpa && gpa < part.end());
    assert!(has(0) && has(32 * MIB) && !has(16 * MIB) && !has(63 * MIB), "{data:?}");
    // A layout of QEMU's: what is at 16 MiB in the file is at 4 GiB.
    let low = Segment { range: range(0, 16 * MIB), offset: 0 };
    let high = Segment { range: range(4 << 30, 48 * MIB), offset: 16 * MIB };
    let dump = DumpFile::open_raw(&path, &[high, low]).unwrap();
    let mut bytes = [0; 4];
    dump.read_at((4 << 30) + 16 * MIB, &mut bytes).unwrap();
    assert_eq!(&bytes, b"high");
    let data = dump.data_from(MIB).unwrap().unwrap();
    assert!(data.gpa <= (4 << 30) + 16 * MIB && data.gpa > (4 << 30) + 15 * MIB, "{data}");
    assert_eq!(dump.data_from((4 << 30) + 17 * MIB).unwrap(), None);
}

#[test]
fn the_record_beside_a_raw_dump_says_where_there_is_memory() {
    let (_directory, path) = file(&[1; 0x5000]);
    let record = PathBuf::from(format!("{}.json", path.display()));
    fs::write(&record, r#"{"format": "raw", "ranges": [{"gpa": "0x1000", "len": 4096}, {"gpa": "0x4000", "len": 4096}], "more": 1}"#).unwrap();
    let dump = DumpFile::open(&path).unwrap();
    assert_eq!(dump.ranges().unwrap(), [range(0x1000, 0x1000), range(0x4000, 0x1000)]);
    assert_eq!(dump.missing_record(), None);
    for text in [
        "{}",
        "[",
        r#"{"format": "elf", "ranges": []}"#,
        r#"{"format": "raw", "ranges": [{"gpa": "1", "len": 1}]}"#,
    ] {
        fs::write(&record, text).unwrap();
        let error = DumpFile::open(&path).unwrap_err();
        assert!(matches!(&error, DumpError::Malformed { path, .. } if *path == record), "{error}");
    }
    fs::write(format!("{}.part", path.display()), "").unwrap();
    assert!(matches!(DumpFile::open(&path), Err(DumpError::Unfinished { .. })));
}

#[test]
fn a_file_that_is_cut_short_is_refused() {
    let whole = [
        elf(&[(0, &[1; 0x1000], 0), (0x8000, &[2; 0x1000], 0)], false),
        lime(&[(0, &[1; 0x1000]), (0x8000, &[2; 0x1000])]),
    ];
    for bytes in whole {
        let (_directory, path) = file(&bytes);
        DumpFile::open(&path).unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        // All cuts within the headers, and some within the memory; one is between two ranges of
        // LiME's.
        for len in
            (5..bytes.len()).rev().filter(|len| *len < 512 || len % 61 == 0 || *len == 0x1020)
        {
            file.set_len(len as u64).unwrap();
            match DumpFile::open(&path) {
                // Between two ranges of LiME's nothing shows that one is missing.
                Ok(dump) => assert_eq!((dump.format(), len), (Format::Lime, 0x1020)),
                Err(DumpError::Truncated { range, .. }) => assert_eq!(range.len, 0x1000),
                Err(error) => {
                    assert!(matches!(error, DumpError::Malformed { .. }), "{len}: {error}")
                }
            }
        }
    }
    let (_directory, path) = file(&[0; 0x1000]);
    let dump = DumpFile::open(&path).unwrap();
    fs::write(&path, []).unwrap();
    assert!(matches!(dump.read_at(0, &mut [0; 8]), Err(MemoryError::Unreadable { gpa: 0, .. })));
    assert!(matches!(DumpFile::open(&path), Err(DumpError::Empty { .. })));
}

/// Bytes of which no two pages are the same.
fn pattern(len: usize) -> Vec<u8> {
    (0..len).map(|at| (at / 5 * 31).to_le_bytes()[0]).collect()
}

#[test]
fn large_reads_are_those_of_small_ones() {
    let bytes = pattern(0x4_0000);
    let (low, high) = bytes.split_at(0x1_8000);
    // The ranges are neighbours, but not in the file.
    let files =
        [elf(&[(0, low, 0), (0x1_8000, high, 0)], false), lime(&[(0, low), (0x1_8000, high)])];
    for (_directory, path) in files.iter().map(|bytes| file(bytes)).chain([file(&bytes)]) {
        let dump = DumpFile::open(&path).unwrap();
        for (gpa, len) in [(0, 0x4_0000), (1, 0x3_fffe), (0x7fff, 0x2_0001), (0x2_0000, 0x2_0000)] {
            let mut copy = vec![0; len];
            dump.read_at(gpa as u64, &mut copy).unwrap();
            assert!(copy == bytes[gpa..gpa + len], "{gpa:#x} {len:#x} {:?}", dump.format());
        }
        let mut copy = [0; 0x100];
        let (memory, offset) = dump.mapped(0x2_0000, 0x100).unwrap();
        memory.read(offset, &mut copy).unwrap();
        assert_eq!(copy, bytes[0x2_0000..0x2_0100]);
        assert_eq!(dump.mapped(0x1_7fff, 2).is_some(), dump.format() == Format::Raw);
        assert!(dump.mapped(0x3_ffff, 2).is_none() && dump.mapped(u64::MAX, u64::MAX).is_none());
    }
}

#[test]
fn the_core_of_a_process_is_no_dump_of_a_machine() {
    let page = [1; 0x1000];
    let open = |segments: &[(u64, &[u8], u64)]| {
        let (_directory, path) = file(&elf(segments, false));
        DumpFile::open(&path)
    };
    let error = open(&[(0, &page, 0), (0, &page[..0x800], 0)]).unwrap_err();
    assert!(error.to_string().contains("core of a process"), "{error}");
    // One range from address 0, and page 0 at two virtual addresses.
    open(&[(0, &page, 0)]).unwrap();
    open(&[(0, &page, 0), (0, &page, 0), (0x1000, &page, 0)]).unwrap();
}

#[test]
fn a_file_that_shrinks_while_it_is_searched_has_no_hole_from_there_on() {
    for len in [0x1_0000, 0] {
        let (_directory, path) = file(&pattern(0x8_0000));
        let dump = DumpFile::open(&path).unwrap();
        File::options().write(true).open(&path).unwrap().set_len(len).unwrap();
        let data: Vec<_> = (&dump as &dyn Memory).data().collect();
        assert!(matches!(data.last(), Some(Err(MemoryError::Ended(_)))), "{data:?}");
    }
}

#[test]
fn a_file_that_shrinks_while_it_is_read_is_an_error_that_names_it() {
    let (_directory, path) = file(&pattern(0x8_0000));
    let dump = DumpFile::open(&path).unwrap();
    let mut copy = vec![0; 0x4_0000];
    dump.read_at(0x4_0000, &mut copy).unwrap();
    File::options().write(true).open(&path).unwrap().set_len(0x5_0000).unwrap();
    let error = dump.read_at(0x4_0000, &mut copy).unwrap_err();
    let source = std::error::Error::source(&error).unwrap().to_string();
    assert!(matches!(error, MemoryError::Unreadable { gpa: 0x4_0000, .. }), "{error}");
    assert_eq!(source, format!("cannot read {} at offset 0x40000", path.display()));
    let (memory, offset) = dump.mapped(0x4_0000, 0x4_0000).unwrap();
    assert!(memory.read(offset, &mut copy).is_err());
    // What is there still is read.
    dump.read_at(0x1_0000, &mut copy).unwrap();
    assert!(copy == pattern(0x8_0000)[0x1_0000..0x5_0000]);
}

#[test]
fn holes_of_a_file_in_memory_stay_holes() {
    let memory = File::from(rustix::fs::memfd_create("dump", MemfdFlags::CLOEXEC).unwrap());
    memory.set_len(4 * MIB).unwrap();
    memory.write_all_at(&[1; 0x1000], 2 * MIB).unwrap();
    let blocks = memory.metadata().unwrap().blocks();
    let dump = DumpFile::open(Path::new(&format!("/proc/self/fd/{}", memory.as_raw_fd()))).unwrap();
    let mut copy = vec![0; 2 << 20];
    for gpa in [0, MIB, 2 * MIB] {
        dump.read_at(gpa, &mut copy).unwrap();
    }
    assert_eq!(copy.iter().position(|byte| *byte == 0), Some(0x1000));
    assert_eq!(memory.metadata().unwrap().blocks(), blocks);
}

#[test]
fn other_formats_are_named() {
    for (bytes, what) in [
        (&b"KDUMP   x"[..], "makedumpfile -E"),
        (b"\x28\xb5\x2f\xfdx", "zstd -d"),
        (b"QEVMx", "QEMU"),
    ] {
        let (_directory, path) = file(bytes);
        let error = DumpFile::open(&path).unwrap_err().to_string();
        assert!(error.contains(what), "{error}");
    }
    let mut program = elf(&[(0, &[0; 16], 0)], false);
    program[16] = 2;
    let (_directory, path) = file(&program);
    assert!(DumpFile::open(&path).unwrap_err().to_string().contains("not a core"));
    assert!(matches!(DumpFile::open(Path::new("/nonexistent")), Err(DumpError::Open { .. })));
}

#[test]
fn what_has_no_offsets_is_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let (fifo, socket) = (directory.path().join("fifo"), directory.path().join("socket"));
    // It has no writer: opening it for reading would wait.
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)
        .unwrap();
    let _listener = UnixListener::bind(&socket).unwrap();
    for (path, words) in [
        (fifo.as_path(), "is a pipe: write what comes through it to a file first"),
        (directory.path(), "is a directory: name the dump in it"),
        (&socket, "is a socket"),
        (Path::new("/dev/zero"), "is a character device"),
    ] {
        let error = DumpFile::open(path).unwrap_err();
        assert!(matches!(error, DumpError::Foreign { .. }), "{error:?}");
        assert!(error.to_string().contains(words), "{error}");
        assert!(DumpFile::open_raw(path, &[]).is_err());
    }
    // The record beside a dump.
    let dump = directory.path().join("dump");
    fs::write(&dump, [1; 0x1000]).unwrap();
    assert_eq!(
        DumpFile::open(&dump).unwrap().missing_record().unwrap(),
        directory.path().join("dump.json")
    );
    fs::rename(&fifo, directory.path().join("dump.json")).unwrap();
    assert!(matches!(DumpFile::open(&dump), Err(DumpError::Foreign { what: "a pipe", .. })));
}

proptest! {
    #[test]
    fn no_headers_do_harm(
        has_notes: bool,
        is_elf: bool,
        changes in proptest::collection::vec((0usize..400, any::<u8>()), 0..8),
        gpa: u64,
    ) {
        let (one, two) = ([1; 0x100], [2; 0x80]);
        let mut bytes = if has_notes {
            elf_with_notes(&[qemu_note(ControlRegisters::default(), 1), note(b"X\0\0\0", 2, &one)].concat())
        } else if is_elf { elf(&[(0x1000, &one, 0x10), (0x2000, &two, 0)], true) } else { lime(&[(0x1000, &one), (0x2000, &two)]) };
        for (at, byte) in changes {
            let len = bytes.len();
            bytes[at % len] = byte;
        }
        let (_directory, path) = file(&bytes);
        if let Ok(dump) = DumpFile::open(&path) {
            let _ = dump.vcpus();
            let ranges = dump.ranges().unwrap();
            prop_assert!(ranges.iter().zip(ranges.iter().skip(1)).all(|(a, b)| a.end() < b.gpa || a.end() == b.gpa));
            for gpa in [gpa, 0x1000, 0x10f0, 0x2000, u64::MAX] {
                let mut bytes = [0; 32];
                let is_there = dump.read_at(gpa, &mut bytes).is_ok();
                prop_assert!(!is_there || ranges.iter().any(|range| range.gpa <= gpa && gpa < range.end()));
                let _ = dump.data_from(gpa);
            }
        }
    }
}
