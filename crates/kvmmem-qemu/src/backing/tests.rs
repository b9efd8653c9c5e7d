// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mappings that could be RAM, and regions in them.

use super::*;

const FILE: FileId = FileId { device: 1, inode: 7 };

fn mapping(hva: u64, len: u64, file: Option<(FileId, u64)>, is_shared: bool) -> Mapping {
    Mapping { hva, len, is_shared, file, path: "/memfd:x".to_owned() }
}

fn region(gpa: u64, len: u64, offset: u64, file: u32) -> Region {
    Region { gpa, len, offset, file }
}

#[test]
fn a_file_that_is_mapped_twice_is_one_candidate() {
    let mappings = [
        mapping(0x1_0000, 0x4000, Some((FILE, 0)), true),
        mapping(0x2_0000, 0x4000, Some((FILE, 0)), true),
        mapping(0x3_0000, 0x4000, Some((FILE, 0x4000)), true),
        mapping(0x4_0000, 0x4000, None, false),
        mapping(0x5_0000, 0x4000, Some((FILE, 0)), false),
        mapping(0x6_0000, 0x5000, None, false),
    ];
    let candidates = candidates(&mappings, 0x4000, &[0x4000]);
    let places: Vec<u64> = candidates.iter().map(|backing| backing.hva).collect();
    assert_eq!(places, [0x1_0000, 0x3_0000, 0x4_0000, 0x5_0000]);
    let inner = at(&mappings, 0x3_1000, 0x3000).unwrap();
    assert_eq!(inner.shared, Some((FILE, 0x5000)));
    for (hva, size) in [(0x3_1000, 0x4000), (0, 1), (u64::MAX, u64::MAX)] {
        assert!(matches!(at(&mappings, hva, size), Err(Obstacle::NotThere { .. })));
    }
}

#[test]
fn parts_that_are_one_mapping_are_found_in_either_order() {
    let mappings = [
        mapping(0x10_0000, 0x6000, None, false),
        mapping(0x20_0000, 0x6000, Some((FILE, 0x1000)), true),
        mapping(0x30_0000, 0x7000, None, false),
        mapping(0x40_0000, 0x2000, None, false),
    ];
    let places = |size| {
        let found = candidates(&mappings, size, &[0x4000, 0x2000]);
        assert!(found.iter().all(|backing| backing.len == size));
        found.into_iter().map(|backing| (backing.hva, backing.shared)).collect::<Vec<_>>()
    };
    let shared = |offset| Some((FILE, offset));
    assert_eq!(
        places(0x4000),
        [
            (0x10_0000, None),
            (0x10_2000, None),
            (0x20_0000, shared(0x1000)),
            (0x20_2000, shared(0x3000))
        ]
    );
    assert_eq!(
        places(0x2000),
        [
            (0x40_0000, None),
            (0x10_4000, None),
            (0x10_0000, None),
            (0x20_4000, shared(0x5000)),
            (0x20_0000, shared(0x1000))
        ]
    );
    // Two halves are the same in both orders.
    assert_eq!(candidates(&mappings, 0x3000, &[0x3000, 0x3000]).len(), 4);
    assert_eq!(candidates(&mappings, u64::MAX, &[u64::MAX, 2]), []);
    let [low, high] = [0x10_0000, 0x10_4000].map(|hva| at(&mappings, hva, 0x2000).unwrap());
    assert!(low.overlaps(&low) && !low.overlaps(&high));
    assert!(low.overlaps(&at(&mappings, 0x10_1000, 0x1000).unwrap()));
}

#[test]
fn private_ram_is_at_addresses_of_the_process() {
    let process = Process::open(std::process::id()).unwrap();
    let backing = |hva, len| Backing { hva, len, shared: None, path: String::new() };
    let backings = [backing(0x10_0000, 0x4000), backing(0x20_0000, 0x2000)];
    let regions = [region(0, 0x4000, 0, 0), region(0x4000, 0x1000, 0x1000, 1)];
    let held = hold(&process, &regions, &backings).unwrap();
    assert!(matches!(held.source, Source::Process { reason: Obstacle::Private(0x4000), .. }));
    assert_eq!(
        held.regions,
        [region(0, 0x4000, 0x10_0000, 0), region(0x4000, 0x1000, 0x20_1000, 0)]
    );
    for beyond in [region(0, 0x5000, 0, 0), region(0, 0x1000, u64::MAX, 0), region(0, 0x1000, 0, 2)]
    {
        assert!(matches!(hold(&process, &[beyond], &backings), Err(Obstacle::NotFound(_))));
    }
}
