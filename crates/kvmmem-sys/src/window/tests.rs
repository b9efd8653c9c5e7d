// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Windows, and what replaces their content.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;

use super::*;

#[test]
fn addresses_are_congruent_to_offsets() {
    let file = memory_file("test", 4 * GIANT_PAGE).unwrap();
    let cases = [
        (0x5000, 0x3000, PAGE_SIZE),
        (0x5000, LARGE_PAGE, LARGE_PAGE),
        (LARGE_PAGE + 0x1000, 3 * LARGE_PAGE, LARGE_PAGE),
        (GIANT_PAGE + LARGE_PAGE, GIANT_PAGE, GIANT_PAGE),
        (GIANT_PAGE - 0x1000, 2 * GIANT_PAGE, GIANT_PAGE),
    ];
    for (offset, len, alignment) in cases {
        let mapping = GuestMapping::of_file(file.as_fd(), offset, len, Access::ReadOnly).unwrap();
        assert_eq!(mapping.address() % alignment, offset % alignment, "{offset:#x} {len:#x}");
        assert_eq!(mapping.len(), len);
    }
}

#[test]
fn huge_pages_are_mapped_whole_and_shown_in_part() {
    use crate::huge::tests::{HUGE, huge_file};
    let Some(file) = huge_file(3) else { return };
    let poison = PoisonFile::new().unwrap();
    let word = |offset| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_le_bytes(bytes)
    };
    for (offset, len) in
        [(0x3000, 0x1000), (HUGE - 0x1000, 0x2000), (HUGE, HUGE), (0x1000, 3 * HUGE - 0x1000)]
    {
        let mut mapping =
            GuestMapping::of_file(file.as_fd(), offset, len, Access::ReadWrite).unwrap();
        assert_eq!((mapping.address() % HUGE, mapping.len()), (offset % HUGE, len));
        assert!(
            mapping.store_word(0, offset + 7)
                && !mapping.store_word(usize::try_from(len / 8).unwrap(), 0)
        );
        assert_eq!(word(offset), offset + 7);
        mapping.poison_in_place(&poison).unwrap();
        assert!(mapping.store_word(0, 9));
        assert_eq!(word(offset), offset + 7);
        let mut read_only =
            GuestMapping::of_file(file.as_fd(), offset, len, Access::ReadOnly).unwrap();
        read_only.poison_in_place(&poison).unwrap();
    }
    // Dropped mappings took nothing of their neighbours along: all of it can be had again and
    // again.
    let maps = || std::fs::read_to_string("/proc/self/maps").unwrap().matches("memfd:huge").count();
    let before = maps();
    for _ in 0..100 {
        drop(GuestMapping::of_file(file.as_fd(), 0x3000, 0x1000, Access::ReadOnly).unwrap());
    }
    assert!(maps() <= before + 8);
}

#[test]
fn bad_ranges_are_refused() {
    let file = memory_file("test", 0x4000).unwrap();
    for (offset, len) in [(1, 0x1000), (0, 0), (0, 1), (0, !0xfff), (0, 1 << 62)] {
        let mapping = GuestMapping::of_file(file.as_fd(), offset, len, Access::ReadOnly);
        assert!(mapping.is_err(), "{offset:#x} {len:#x}");
    }
}

#[test]
fn words_reach_the_file_until_it_is_poisoned() {
    let file = memory_file("test", 0x4000).unwrap();
    let poison = PoisonFile::new().unwrap();
    let word = |offset| {
        let mut bytes = [0; 8];
        file.read_exact_at(&mut bytes, offset).unwrap();
        u64::from_le_bytes(bytes)
    };
    let mut mapping =
        GuestMapping::of_file(file.as_fd(), 0x1000, 0x2000, Access::ReadWrite).unwrap();
    assert!(mapping.store_word(2, 7) && mapping.store_word(0x3ff, 8));
    assert!(!mapping.store_word(0x400, 9) && !mapping.store_word(usize::MAX, 9));
    assert_eq!([word(0x1010), word(0x2ff8), word(0x3000)], [7, 8, 0]);
    mapping.poison_in_place(&poison).unwrap();
    assert!(mapping.store_word(2, 9));
    assert_eq!(word(0x1010), 7);
    let mut read_only = GuestMapping::of_file(file.as_fd(), 0, 0x1000, Access::ReadOnly).unwrap();
    assert!(!read_only.store_word(0, 1));
    read_only.poison_in_place(&poison).unwrap();
    assert!(!read_only.store_word(0, 1));
}

#[test]
fn writing_to_long_poison_fills_no_more_than_one_part() {
    let file = PoisonFile::new().unwrap();
    let mut poison = GuestMapping::poison(1 << 30, Access::ReadWrite, &file).unwrap();
    for page in 0..(1 << 30) / 4096 / 16 {
        assert!(poison.store_word(page * 16 * 512, 1));
    }
    let used = rustix::fs::fstat(&file.file).unwrap().st_blocks * 512;
    assert!(usize::try_from(used).unwrap() <= PoisonFile::CHUNK, "{used:#x}");
    // Longer poison repeats a longer part, but no more often.
    assert_eq!(file.chunk_for(16 << 30), PoisonFile::CHUNK);
    assert_eq!((1usize << 40).div_ceil(file.chunk_for(1 << 40)), PoisonFile::MOST_PARTS);
    assert!(file.chunk_for(1 << 47) as u64 <= PoisonFile::FILE_LEN);
}
