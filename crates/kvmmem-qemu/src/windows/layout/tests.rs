// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Nothing but the grant is in a window, and all of it.

use kvmmem_abi::native::{RIGHT_READ, STATE_OPEN};
use proptest::prelude::*;

use super::*;

const GIB: u64 = 1 << 30;

fn region(gpa: u64, len: u64, offset: u64) -> Region {
    Region { gpa, len, offset, file: 0 }
}

fn file(size: u64) -> impl Fn(u32) -> Option<Shape> {
    move |file| (file == 0).then_some(Shape { size, page: PAGE_SIZE })
}

/// A PC's RAM: a gap behind the VGA adapter, and a hole below 4 GiB.
fn pc(low: u64, size: u64) -> Vec<Region> {
    let mut regions = vec![region(0, 0xa_0000, 0), region(0xc_0000, low - 0xc_0000, 0xc_0000)];
    if size > low {
        regions.push(region(4 * GIB, size - low, low));
    }
    regions
}

fn lens(layout: &WindowLayout) -> Vec<u64> {
    layout.windows.iter().map(|window| window.len).collect()
}

#[test]
fn all_ram_is_as_few_windows_as_its_size_has_bits() {
    let cases: [(Vec<Region>, u64, Vec<u64>); 3] = [
        (pc(GIB / 2, GIB / 2), GIB / 2, vec![GIB / 2]),
        (pc(2 * GIB, 5 * GIB), 5 * GIB, vec![4 * GIB, GIB]),
        (pc(3 * GIB, 7 * GIB), 7 * GIB, vec![4 * GIB, 2 * GIB, GIB]),
    ];
    for (regions, size, expected) in cases {
        let layout = cut(&regions, true, true, file(size)).unwrap();
        assert_eq!(lens(&layout), expected);
        let shown: u64 = layout.ranges.iter().map(|range| range.len).sum();
        assert_eq!(shown, size - 0x2_0000);
    }
}

#[test]
fn without_offsets_whole_files_are_shown_or_nothing() {
    let layout = cut(&pc(GIB / 2, GIB / 2), true, false, file(GIB / 2)).unwrap();
    assert_eq!(layout.windows, [Window { file: 0, offset: 0, len: GIB / 2 }]);
    assert_eq!(layout.ranges.len(), 2);
    assert_eq!(
        cut(&pc(GIB / 2, GIB / 2), false, false, file(GIB / 2)),
        Err(WindowLayoutError::Partial)
    );
    assert_eq!(
        cut(&pc(2 * GIB, 5 * GIB), true, false, file(5 * GIB)),
        Err(WindowLayoutError::OddFile(5 * GIB))
    );
    // The whole of one node's file, though not of the target.
    let node = [Region { gpa: 0, len: GIB, offset: 0, file: 1 }];
    let shape = |file| (file == 1).then_some(Shape { size: GIB, page: PAGE_SIZE });
    assert_eq!(lens(&cut(&node, false, false, shape).unwrap()), [GIB]);
}

#[test]
fn nodes_have_windows_of_their_own() {
    let mut regions = pc(GIB, GIB);
    regions.push(Region { gpa: 4 * GIB, len: 2 * GIB, offset: 0, file: 1 });
    let shape = |file| Some(Shape { size: [GIB, 2 * GIB][file as usize], page: PAGE_SIZE });
    for has_offset in [true, false] {
        let layout = cut(&regions, true, has_offset, shape).unwrap();
        assert_eq!(
            layout.windows.iter().map(|w| (w.file, w.len)).collect::<Vec<_>>(),
            [(0, GIB), (1, 2 * GIB)]
        );
        assert_eq!(layout.ranges.iter().map(|range| range.window).collect::<Vec<_>>(), [1, 1, 2]);
    }
}

#[test]
fn huge_pages_are_not_cut() {
    let page = 2 << 20;
    let shape = |_| Some(Shape { size: GIB, page });
    assert_eq!(lens(&cut(&pc(GIB, GIB), true, true, shape).unwrap()), [GIB]);
    let refused = Err(WindowLayoutError::HugePage { gpa: 0x10_0000, page });
    assert_eq!(cut(&[region(0x10_0000, page, 0x10_0000)], false, true, shape), refused);
    assert_eq!(
        lens(&cut(&[region(page, 3 * page, page)], false, true, shape).unwrap()),
        [2 * page, page]
    );
}

#[test]
fn what_cannot_be_shown_is_refused() {
    assert_eq!(cut(&[], true, true, file(GIB)), Err(WindowLayoutError::Nothing));
    assert_eq!(cut(&pc(GIB, GIB), true, true, |_| None), Err(WindowLayoutError::NoFile(0)));
    assert_eq!(cut(&pc(GIB, GIB), true, true, file(GIB / 2)), Err(WindowLayoutError::NoFile(0)));
    let odd: Vec<Region> = (0..33).map(|n| region(n << 20, 0x3000, n << 20)).collect();
    assert_eq!(cut(&odd, false, true, file(GIB)), Err(WindowLayoutError::TooMany(66)));
    assert_eq!(cut(&odd[..32], false, true, file(GIB)).unwrap().windows.len(), 64);
}

/// Disjoint regions in one or two files, in any order in their files.
fn regions() -> impl Strategy<Value = Vec<Region>> {
    let one = (0u64..0x40, 1u64..0x400, 0u32..2);
    proptest::collection::vec(one, 1..6).prop_shuffle().prop_map(|list| {
        let mut gpa = 0;
        let mut offsets = [0u64; 2];
        let mut regions: Vec<Region> = Vec::new();
        for (gap, pages, file) in list {
            let offset = &mut offsets[file as usize];
            *offset += gap << 11 & !0xfff;
            gpa += gap << 12;
            let len = pages << 12;
            regions.push(Region { gpa, len, offset: *offset, file });
            gpa += len;
            *offset += len;
        }
        regions
    })
}

proptest! {
    #[test]
    fn every_granted_page_is_shown_once_and_no_other_unless_all_is_granted(
        regions in regions(),
        is_whole: bool,
        slack in 0u64..0x600,
    ) {
        let end = |file: u32| {
            regions.iter().filter(|r| r.file == file).map(|r| r.offset + r.len).max().unwrap_or(0)
        };
        let shape = |file| Some(Shape { size: end(file) + (slack << 12), page: PAGE_SIZE });
        let cut = cut(&regions, is_whole, true, shape);
        if let Err(WindowLayoutError::TooMany(_)) = cut {
            return Ok(());
        }
        let WindowLayout { windows, ranges } = cut.unwrap();
        let granted = |file: u32, offset: u64| {
            regions.iter().find(|r| r.file == file && (r.offset..r.offset + r.len).contains(&offset))
        };
        let mut shown = 0;
        for (number, window) in (1u32..).zip(&windows) {
            prop_assert!(window.len.is_power_of_two() && window.offset % PAGE_SIZE == 0);
            prop_assert!(window.offset + window.len <= shape(window.file).unwrap().size);
            for offset in (0..window.len).step_by(4096) {
                let region = granted(window.file, window.offset + offset);
                let mut found = ranges
                    .iter()
                    .filter(|range| range.window == number && (range.offset..range.offset + range.len).contains(&offset));
                let gpa = found.next().map(|range| range.gpa + (offset - range.offset));
                prop_assert!(found.next().is_none());
                prop_assert_eq!(gpa, region.map(|r| r.gpa + (window.offset + offset - r.offset)));
                prop_assert!(is_whole || region.is_some());
                shown += u64::from(region.is_some());
            }
        }
        prop_assert_eq!(shown << 12, regions.iter().map(|r| r.len).sum::<u64>());
        // As the guest's driver checks it.
        let descriptor = kvmmem_abi::descriptor::Descriptor {
            state: STATE_OPEN, rights: RIGHT_READ, ..Default::default()
        };
        let mut page = [0; kvmmem_abi::descriptor::SIZE];
        descriptor.write(&ranges, &mut page);
        let len = |number: u32| windows.get(number.checked_sub(1)? as usize).map(|window| window.len);
        let mut read = [WindowRange::default(); MAX_RANGES];
        kvmmem_abi::descriptor::Descriptor::read(&page, &mut read, len).unwrap();
        prop_assert_eq!(&read[..ranges.len()], &ranges[..]);
    }

    #[test]
    fn any_regions_are_cut_or_refused(
        numbers in proptest::collection::vec((0u64..1 << 52, 0u64..1 << 52, 0u64..1 << 52), 0..4),
        size: u64,
        page in prop::sample::select(vec![0u64, 1, 0x1000, 0x20_0000, 1 << 63]),
        is_whole: bool,
        has_offset: bool,
    ) {
        let regions: Vec<Region> = numbers.iter().map(|(gpa, len, offset)| region(gpa & !0xfff, len & !0xfff, offset & !0xfff)).collect();
        let _ = cut(&regions, is_whole, has_offset, |_| Some(Shape { size, page }));
    }
}
