// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The host's memory against a plain buffer, and its changes and ends.

use std::fs::File;
use std::os::unix::fs::FileExt;

use kvmmem_sys::foreign::ForeignError;
use proptest::prelude::*;
use rustix::fs::{MemfdFlags, memfd_create};

use super::*;

const READ: ViewOperation = ViewOperation::Read { gpa: 0, len: 0 };
const PAGE: u64 = 0x1000;

/// A file in which every word holds its own offset.
fn file(pages: u64) -> File {
    let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(pages * PAGE).unwrap();
    for offset in (0..pages * PAGE).step_by(8) {
        file.write_all_at(&offset.to_le_bytes(), offset).unwrap();
    }
    file
}

fn region(gpa: u64, pages: u64, offset: u64) -> Region {
    Region { gpa: gpa * PAGE, len: pages * PAGE, offset: offset * PAGE, file: 0 }
}

fn memory(regions: &[Region], file: &File) -> Memory {
    Memory::new(4, regions.to_vec(), Source::Files(Arc::new([file.try_clone().unwrap().into()])))
}

fn pages(gpa: u64, pages: u64) -> Range {
    Range { gpa: gpa * PAGE, len: pages * PAGE }
}

#[test]
fn a_mapping_spans_regions_that_lie_apart_in_the_file() {
    let file = file(8);
    let memory = memory(&[region(0, 2, 5), region(2, 1, 0), region(4, 1, 2)], &file);
    let mapping = memory.map(READ, pages(1, 2), true).unwrap();
    assert_eq!(mapping.read_word::<u64>(0x10).unwrap(), 6 * PAGE + 0x10);
    assert_eq!(mapping.read_word::<u64>(PAGE + 0x10).unwrap(), 0x10);
    mapping.write(PAGE - 1, &[0xaa, 0xbb]).unwrap();
    let mut bytes = [0; 1];
    file.read_exact_at(&mut bytes, 7 * PAGE - 1).unwrap();
    assert_eq!(bytes, [0xaa]);
    file.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0xbb]);
    for (range, hole) in [(pages(1, 3), 3), (pages(3, 1), 3), (pages(4, 2), 5), (pages(7, 1), 7)] {
        let error = memory.map(READ, range, true).unwrap_err();
        assert!(
            matches!(error, ViewError::Hole { gpa, .. } if gpa == hole * PAGE),
            "{range}: {error}"
        );
    }
}

#[test]
fn a_mapping_spans_regions_in_several_files() {
    let files = [file(4), file(4)];
    files[1].write_all_at(b"node one", 0).unwrap();
    let second = Region { file: 1, ..region(4, 4, 0) };
    let owned = files.iter().map(|file| file.try_clone().unwrap().into()).collect();
    let memory = Memory::new(
        4,
        vec![region(0, 4, 0), second, Region { file: 2, ..region(8, 1, 0) }],
        Source::Files(owned),
    );
    let mapping = memory.map(READ, pages(3, 2), true).unwrap();
    let mut bytes = [0; 16];
    mapping.read(PAGE - 8, &mut bytes).unwrap();
    assert_eq!(
        (&bytes[..8], &bytes[8..]),
        ((4 * PAGE - 8).to_le_bytes().as_slice(), b"node one".as_slice())
    );
    mapping.write(PAGE, b"N").unwrap();
    let mut byte = [0];
    assert_eq!(memory.read(READ, 4 * PAGE, &mut byte).unwrap(), 1);
    assert_eq!(&byte, b"N");
    assert_eq!(memory.write(READ, 4 * PAGE - 1, b"ab").unwrap(), 1);
    // No such file came.
    assert!(matches!(memory.read(READ, 8 * PAGE, &mut byte), Err(ViewError::Hole { .. })));
    assert!(memory.map(READ, pages(7, 2), true).is_err());
    // The nodes change places.
    memory.change(6, vec![Region { file: 1, ..region(0, 4, 0) }, region(4, 4, 0)]);
    mapping.read(0, &mut bytes).unwrap();
    assert_eq!(bytes[..8], (3 * PAGE).to_le_bytes());
    assert_eq!(mapping.read_word::<u64>(PAGE + 8).unwrap(), 8);
}

#[test]
fn mappings_follow_the_regions() {
    let file = file(8);
    let memory = memory(&[region(0, 4, 0)], &file);
    let mapping = memory.map(READ, pages(0, 4), false).unwrap();
    memory.change(6, vec![region(1, 1, 7), region(3, 3, 4)]);
    assert_eq!(memory.reach().ranges(), [pages(1, 1), pages(3, 3)]);
    assert_eq!(mapping.read_word::<u64>(8), Err(ForeignError::Lost { offset: 8 }));
    assert_eq!(mapping.read_word::<u64>(PAGE), Ok(7 * PAGE));
    assert_eq!(
        mapping.read(PAGE + 8, &mut [0; 0x1000]),
        Err(ForeignError::Lost { offset: 2 * PAGE })
    );
    assert_eq!(mapping.read_word::<u64>(3 * PAGE), Ok(4 * PAGE));
    assert_eq!(memory.wait(Duration::ZERO), Some(Event::Changed));
    assert_eq!(memory.wait(Duration::ZERO), None);
    memory.change(8, vec![region(0, 4, 0)]);
    assert_eq!(mapping.read_word::<u64>(8), Ok(8));
    assert_eq!(memory.reach().generation, 8);
}

#[test]
fn huge_pages_are_mapped_in_part_and_written() {
    const HUGE: u64 = 2 << 20;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB;
    let made = memfd_create("huge", flags).map(File::from).and_then(|file| {
        rustix::fs::ftruncate(&file, 2 * HUGE)?;
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 2 * HUGE)?;
        Ok(file)
    });
    let Ok(file) = made.inspect_err(|error| {
        eprintln!("skipped: no 2 huge pages ({error}): sysctl vm.nr_hugepages=16 sets some aside")
    }) else {
        return;
    };
    // As a PC has it: a hole, and memory above 4 GiB that lies behind in the file. The first two
    // are adjacent.
    let cut = |gpa, end, offset| Region { gpa, len: end - gpa, offset, file: 0 };
    let regions = [
        cut(0, 0x5_0000, 0),
        cut(0x5_0000, 0xa_0000, 0x5_0000),
        cut(0xc_0000, HUGE, 0xc_0000),
        cut(1 << 32, (1 << 32) + HUGE, HUGE),
    ];
    let memory = memory(&regions, &file);
    for (gpa, len, offset) in [
        (0, 0xa_0000, 0),
        (0x4_f000, 0x2000, 0x4_f000),
        (0xc_0000, 0x1000, 0xc_0000),
        (1 << 32, HUGE, HUGE),
    ] {
        assert_eq!(memory.write(READ, gpa, b"written").unwrap(), 7);
        let mapping = memory.map(READ, Range { gpa, len }, true).unwrap();
        let mut bytes = [0; 7];
        mapping.read(0, &mut bytes).unwrap();
        assert_eq!(&bytes, b"written", "{gpa:#x}");
        mapping.write(len - 5, b"mapped").unwrap_err();
        mapping.write(len - 6, b"mapped").unwrap();
        file.read_exact_at(&mut bytes[..6], offset + len - 6).unwrap();
        assert_eq!(&bytes[..6], b"mapped");
    }
    let mapping = memory.map(READ, Range { gpa: 0, len: 0xa_0000 }, false).unwrap();
    // What a huge page's rest would show is lost instead.
    memory.change(6, vec![cut(0, 0x5_0000, 0)]);
    assert_eq!(mapping.read(0, &mut [0]), Err(ForeignError::Lost { offset: 0 }));
    assert!(memory.end(State::Revoked));
}

#[test]
fn after_the_end_nothing_is_left() {
    for (state, event) in [(State::Revoked, Event::Revoked), (State::Gone, Event::Gone)] {
        let memory = memory(&[region(0, 4, 0)], &file(4));
        let mapping = memory.map(READ, pages(0, 4), true).unwrap();
        let dropped = memory.map(READ, pages(0, 1), true).unwrap();
        drop(dropped);
        assert!(memory.end(state));
        assert_eq!(mapping.read(5, &mut [0]), Err(ForeignError::Lost { offset: 5 }));
        assert_eq!(mapping.write(5, &[0]), Err(ForeignError::Lost { offset: 5 }));
        let errors = [
            memory.read(READ, 0, &mut [0]).unwrap_err(),
            memory.write(READ, 0, &[0]).unwrap_err(),
            memory.map(READ, pages(0, 1), false).unwrap_err(),
            memory.reach().data_from(READ, 0).unwrap_err(),
        ];
        for error in errors {
            match state {
                State::Revoked => assert!(matches!(error, ViewError::Revoked { .. }), "{error}"),
                _ => assert!(matches!(error, ViewError::Gone { .. }), "{error}"),
            }
        }
        for _ in 0..2 {
            assert_eq!(memory.wait(Duration::ZERO), Some(event));
        }
        // The first end counts.
        assert!(memory.end(State::Gone));
        assert_eq!((memory.reach().state, memory.reach().ranges()), (state, vec![]));
    }
}

#[test]
fn whoever_waits_is_woken() {
    let memory = memory(&[region(0, 1, 0)], &file(1));
    let started = std::sync::Barrier::new(2);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| {
            started.wait();
            memory.wait(Duration::from_secs(60))
        });
        started.wait();
        memory.end(State::Revoked);
        assert_eq!(waiter.join().unwrap(), Some(Event::Revoked));
    });
}

#[test]
fn holes_of_the_file_are_no_data() {
    let file = File::from(memfd_create("ram", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(16 * PAGE).unwrap();
    for page in [2, 3, 9] {
        file.write_all_at(&[1], page * PAGE).unwrap();
    }
    // File pages 0 to 3 at 4, 8 to 11 at 8, 2 to 3 of a hole at 20.
    let memory = memory(&[region(4, 4, 0), region(8, 4, 8), region(20, 2, 12)], &file);
    let data = |gpa| memory.reach().data_from(READ, gpa).unwrap();
    assert_eq!(data(0), Some(pages(6, 2)));
    assert_eq!(data(6 * PAGE + 5), Some(Range { gpa: 6 * PAGE + 5, len: 2 * PAGE - 5 }));
    assert_eq!(data(8 * PAGE), Some(pages(9, 1)));
    assert_eq!(data(10 * PAGE), None);
    assert_eq!(data(u64::MAX), None);
}

proptest! {
    #[test]
    fn copies_are_those_of_a_plain_buffer(
        lens in proptest::collection::vec((0u64..2, 1u64..3), 1..5),
        gpa in 0u64..0x5000,
        bytes in proptest::collection::vec(any::<u8>(), 0..0x2800),
        by_mapping: bool,
    ) {
        // Regions whose order in the file is the reverse of that in memory.
        let mut end = 0;
        let mut regions: Vec<Region> = lens.iter().map(|&(gap, len)| {
            let region = region(end + gap, len, 0);
            end += gap + len;
            region
        }).collect();
        let mut offset = 0;
        for region in regions.iter_mut().rev() {
            region.offset = offset;
            offset += region.len;
        }
        let file = file(offset / PAGE);
        let memory = memory(&regions, &file);

        // What a process sees who has no mapping: every byte of memory, or a hole.
        let mut model = vec![None; usize::try_from((end + 8) * PAGE).unwrap()];
        for region in &regions {
            let mut content = vec![0; usize::try_from(region.len).unwrap()];
            file.read_exact_at(&mut content, region.offset).unwrap();
            for (at, byte) in (region.gpa..).zip(content) {
                model[usize::try_from(at).unwrap()] = Some(byte);
            }
        }
        let start = usize::try_from(gpa).unwrap();
        let reachable = model[start..].iter().take(bytes.len()).take_while(|byte| byte.is_some()).count();
        let expected: Vec<u8> = model[start..start + reachable].iter().map(|byte| byte.unwrap()).collect();

        let first = gpa / PAGE;
        let last = (gpa + reachable.max(1) as u64 - 1) / PAGE;
        let mapping = memory.map(READ, pages(first, last - first + 1), true);
        prop_assert_eq!(mapping.is_ok(), reachable > 0 || (model[start].is_some() && bytes.is_empty()));
        let mut found = vec![0; reachable];
        if let (true, Ok(mapping)) = (by_mapping, &mapping) {
            mapping.read(gpa % PAGE, &mut found).unwrap();
            prop_assert_eq!(&found, &expected);
            mapping.write(gpa % PAGE, &bytes[..reachable]).unwrap();
        } else {
            let (mut done, mut buf) = (0, bytes.clone());
            while done < buf.len() {
                match memory.read(READ, gpa + done as u64, &mut buf[done..]) {
                    Ok(count) => done += count,
                    Err(ViewError::Hole { gpa: hole, .. }) => {
                        prop_assert_eq!(hole, gpa + done as u64);
                        break;
                    }
                    Err(error) => panic!("{error}"),
                }
            }
            prop_assert_eq!(done, reachable);
            prop_assert_eq!(&buf[..done], &expected);
            let mut done = 0;
            while done < reachable {
                done += memory.write(READ, gpa + done as u64, &bytes[done..]).unwrap();
            }
        }
        let mut after = vec![0; reachable];
        let mut done = 0;
        while done < reachable {
            done += memory.read(READ, gpa + done as u64, &mut after[done..]).unwrap();
        }
        prop_assert_eq!(&after, &bytes[..reachable]);
    }
}

/// The pieces, and how far they were filled.
type Outcome = (Vec<Vec<u8>>, Result<(), VectoredError>);

/// Reads pieces three times: from the file, with a look at what is in memory, and through the
/// mapping.
fn read_vectored(memory: &Memory, places: &[(u64, usize)]) -> Vec<Outcome> {
    let read = |_| {
        let mut buffers: Vec<Vec<u8>> = places.iter().map(|(_, len)| vec![0xee; *len]).collect();
        let pairs = places.iter().zip(&mut buffers);
        let mut pieces: Vec<(u64, &mut [u8])> =
            pairs.map(|((gpa, _), bytes)| (*gpa, bytes.as_mut_slice())).collect();
        let result = memory.read_vectored(&mut pieces);
        (buffers, result)
    };
    (0..3).map(read).collect()
}

#[test]
fn a_vectored_read_names_the_first_piece_that_it_cannot_fill() {
    let file = file(8);
    let memory = memory(&[region(0, 2, 5), region(2, 1, 0), region(4, 1, 2)], &file);
    let places = [(0x10, 8), (2 * PAGE - 8, 16), (0, 0), (3 * PAGE - 8, 9), (4 * PAGE, 8)];
    for (buffers, result) in read_vectored(&memory, &places) {
        let error = result.unwrap_err();
        assert_eq!(error.piece, 3);
        assert!(
            matches!(error.source, ViewError::Hole { gpa, .. } if gpa == 3 * PAGE),
            "{}",
            error.source
        );
        assert_eq!(buffers[0], (5 * PAGE + 0x10).to_le_bytes());
        assert_eq!(buffers[1], [7 * PAGE - 8, 0].map(u64::to_le_bytes).concat());
    }
    // More than is read at a time; the piece is counted from the first.
    let mut places = vec![(0, 0x2000); 200];
    places.push((u64::MAX, 1));
    let error = read_vectored(&memory, &places).remove(0).1.unwrap_err();
    assert_eq!(error.piece, 200);
    memory.end(State::Revoked);
    for (_, result) in read_vectored(&memory, &places) {
        assert!(matches!(
            result,
            Err(VectoredError { piece: 0, source: ViewError::Revoked { .. } })
        ));
    }
}

#[test]
fn a_vectored_read_follows_the_memory() {
    let file = file(8);
    let memory = memory(&[region(0, 2, 0)], &file);
    let first = |memory: &Memory| {
        read_vectored(memory, &[(0, 8)])
            .into_iter()
            .map(|(buffers, _)| buffers[0].clone())
            .collect::<Vec<_>>()
    };
    assert_eq!(first(&memory), [0u64.to_le_bytes(); 3]);
    file.write_all_at(b"changed!", 0).unwrap();
    assert_eq!(first(&memory), [*b"changed!"; 3]);
    memory.change(5, vec![region(0, 2, 4)]);
    assert_eq!(first(&memory), [(4 * PAGE).to_le_bytes(); 3]);
}

#[test]
fn a_vectored_read_allocates_none_of_the_memory_that_the_target_never_touched() {
    let file = File::from(memfd_create("sparse", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(8 * PAGE).unwrap();
    file.write_all_at(b"touched", 3 * PAGE).unwrap();
    let memory = memory(&[region(0, 8, 0)], &file);
    let places: Vec<(u64, usize)> = (0..8).map(|page| (page * PAGE, 7)).collect();
    for (buffers, result) in read_vectored(&memory, &places) {
        result.unwrap();
        assert!(
            buffers
                .iter()
                .enumerate()
                .all(|(page, bytes)| bytes == if page == 3 { b"touched" } else { &[0; 7] })
        );
    }
    let blocks = rustix::fs::fstat(&file).unwrap().st_blocks;
    assert_eq!(blocks, 8);
}

#[test]
fn pages_in_a_row_are_read_without_being_allocated() {
    // A block that is whole, one with every other page, one that the target never touched, and the
    // begin of a fourth.
    const PAGES: u64 = 3 * 512 + 40;
    let is_touched =
        |page: u64| page < 512 || page < 1024 && page.is_multiple_of(2) || page >= 1536;
    let file = File::from(memfd_create("rows", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(PAGES * PAGE).unwrap();
    for page in (0..PAGES).filter(|page| is_touched(*page)) {
        file.write_all_at(&page.to_le_bytes(), page * PAGE + 8).unwrap();
    }
    let before = rustix::fs::fstat(&file).unwrap().st_blocks;
    let memory = memory(&[region(0, PAGES, 0)], &file);
    let places: Vec<(u64, usize)> = (0..PAGES).map(|page| (page * PAGE + 8, 8)).collect();
    for (buffers, result) in read_vectored(&memory, &places) {
        result.unwrap();
        for (page, bytes) in (0..).zip(buffers) {
            assert_eq!(bytes, if is_touched(page) { page } else { 0 }.to_le_bytes(), "page {page}");
        }
    }
    assert_eq!(rustix::fs::fstat(&file).unwrap().st_blocks, before);
}

proptest! {
    #[test]
    fn vectored_reads_are_those_of_a_buffer(
        places in proptest::collection::vec((0u64..7 * PAGE, 0usize..0x3000), 0..20),
    ) {
        let file = file(8);
        let memory = memory(&[region(0, 2, 5), region(2, 3, 0), region(6, 1, 3)], &file);
        let mut model = vec![None; 7 * 0x1000];
        for (gpa, pages, offset) in [(0, 2, 5), (2, 3, 0), (6, 1, 3)] {
            for at in (0..pages * PAGE).step_by(8) {
                let place = usize::try_from(gpa * PAGE + at).unwrap();
                let word = (offset * PAGE + at).to_le_bytes();
                model[place..place + 8].copy_from_slice(&word.map(Some));
            }
        }
        let expected = |(gpa, len): &(u64, usize)| -> Option<Vec<u8>> {
            let gpa = usize::try_from(*gpa).unwrap();
            (gpa..gpa + len).map(|at| model.get(at).copied().flatten()).collect()
        };
        for (buffers, result) in read_vectored(&memory, &places) {
            let failed = places.iter().position(|place| expected(place).is_none());
            prop_assert_eq!(result.err().map(|error| error.piece), failed);
            for (place, bytes) in places.iter().zip(buffers).take(failed.unwrap_or(usize::MAX)) {
                prop_assert_eq!(expected(place), Some(bytes));
            }
        }
    }
}
