// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory maps of processes, in lists and in maple trees, whole and damaged.

mod common;

use common::areas::{AREA, AREAS, MM, NODE, NODES, PROCESS, area, task};
use common::{BTF, Guest, Place, btf};
use kvmmem_linux::maps::{Maps, MemoryMap};
use kvmmem_linux::{Find, Kernel, KernelError};
use proptest::prelude::*;

const PLACE: Place = Place::FIRST;

fn read(guest: &Guest) -> Result<MemoryMap, KernelError> {
    let kernel = Kernel::find(guest, Find { note: Some(PLACE.note), ..Find::default() }).unwrap();
    Maps::new(&kernel)?.of(&task(&PLACE))
}

fn bounds(map: &MemoryMap) -> Vec<(u64, u64)> {
    map.mappings.iter().map(|mapping| (mapping.start, mapping.end)).collect()
}

/// A guest whose process has these areas in a tree, and one that has them in a list.
fn guests(ranges: &[(u64, u64)], slots: usize) -> [Guest; 2] {
    [true, false].map(|in_tree| {
        let guest = Guest::with(&[PLACE]);
        guest.areas(&PLACE, ranges, slots);
        if !in_tree {
            guest.put(PLACE.gpa + BTF, &btf::with_areas(false));
            guest.first_of_list(&PLACE, if ranges.is_empty() { 0 } else { area(&PLACE, 0) });
        }
        guest
    })
}

/// Areas of some pages each, with and without gaps.
fn areas(count: u64) -> Vec<(u64, u64)> {
    let start = |index: u64| 0x10_0000 + index * 0x4000;
    (0..count).map(|index| (start(index), start(index) + 0x1000 * (1 + index % 4))).collect()
}

#[test]
fn an_area_has_what_proc_shows_of_it() {
    for guest in guests(&areas(5), 16) {
        let put = |index: u64, at: u64, word: u64| {
            guest.put_word(PLACE.gpa + AREAS + AREA * index + at, word)
        };
        // A heap, a stack, and what may be executed and is shared.
        for (at, word) in [(24, 0x10_8000), (32, 0x10_9000), (40, 0x10_c800)] {
            guest.put_word(PLACE.gpa + MM + at, word);
        }
        put(0, 24, 0x85);
        let map = read(&guest).unwrap();
        assert!(!map.is_torn);
        assert_eq!(bounds(&map), areas(5));
        let labels: Vec<_> = map.mappings.iter().map(|mapping| mapping.label.as_deref()).collect();
        assert_eq!(labels, [None, None, Some("[heap]"), Some("[stack]"), None]);
        let permissions: Vec<_> =
            map.mappings.iter().map(|mapping| mapping.permissions()).collect();
        assert_eq!(permissions[..2], ["r-xs", "rw-p"]);
        assert_eq!(map.find(0x10_4fff).map(|mapping| mapping.start), Some(0x10_4000));
        assert_eq!(
            (map.find(0x10_3fff).is_some(), map.find(0x10_1000), map.find(u64::MAX)),
            (false, None, None)
        );
    }
}

#[test]
fn a_process_without_memory_has_no_mappings() {
    for guest in guests(&[], 16) {
        assert_eq!(read(&guest).unwrap(), MemoryMap::default());
        guest.put_word(PLACE.gpa + PROCESS + 56, 0);
        assert_eq!(read(&guest).unwrap(), MemoryMap::default());
        // A tree without a node.
        guest.put_word(PLACE.gpa + PROCESS + 56, PLACE.gva + MM);
        guest.put_word(PLACE.gpa + MM + 8, 0);
        assert_eq!(read(&guest).unwrap(), MemoryMap::default());
    }
}

#[test]
fn a_map_with_another_number_of_areas_than_the_process_counts_is_torn() {
    for guest in guests(&areas(20), 16) {
        guest.put(PLACE.gpa + MM + 16, &21u32.to_le_bytes());
        assert!(read(&guest).unwrap().is_torn);
    }
}

/// What it is, and what writes it.
type Damage = (&'static str, fn(&Guest));

/// The map is an error or marked, and what is in it ascends.
fn is_refused(guest: &Guest) -> bool {
    read(guest).map_or(true, |map| {
        assert!(bounds(&map).is_sorted_by(|one, two| one.1 <= two.0), "{map:?}");
        map.is_damaged()
    })
}

/// What ends a walk of the tree. Each is an error or marked, not a map that is too short.
#[test]
fn trees_that_lead_back_or_nowhere_are_refused() {
    let damages: &[Damage] = &[
        ("a root that is its own child", |guest| {
            let root = (PLACE.gva + NODES) | 3 << 3 | 2;
            guest.node(PLACE.gpa + NODES, 3, &[(root | 4, u64::MAX)]);
            guest.put_word(PLACE.gpa + MM + 8, root);
        }),
        ("the same leaf twice", |guest| {
            let (leaf, root) = ((PLACE.gva + NODES) | 1 << 3 | 6, NODES + 40 * NODE);
            guest.node(PLACE.gpa + NODES, 1, &[(area(&PLACE, 0), 0x10_0fff), (0, 0x20_0000)]);
            guest.node(PLACE.gpa + root, 3, &[(leaf, 0x20_0000), (leaf, u64::MAX)]);
            guest.put_word(PLACE.gpa + MM + 8, (PLACE.gva + root) | 3 << 3 | 2);
        }),
        ("pivots that descend", |guest| guest.put_word(PLACE.gpa + NODES + 8 + 16, 1)),
        ("a root that is an area", |guest| guest.put_word(PLACE.gpa + MM + 8, area(&PLACE, 0))),
        ("a node of no known kind", |guest| {
            guest.put_word(PLACE.gpa + MM + 8, (PLACE.gva + NODES) | 9 << 3 | 2)
        }),
        ("a node of the null page", |guest| {
            guest.put_word(PLACE.gpa + MM + 8, 0x1000 | 1 << 3 | 2)
        }),
        ("more slots than there are", |guest| {
            guest.put_word(PLACE.gpa + NODES + 8 + 14 * 8, 0);
            guest.put(PLACE.gpa + NODES + 248, &[16]);
        }),
        ("an area elsewhere", |guest| guest.put_word(PLACE.gpa + AREAS, 0x40_0000)),
        ("an area of another process", |guest| guest.put_word(PLACE.gpa + AREAS + 16, PLACE.gva)),
        ("an area that is not whole pages", |guest| {
            guest.put_word(PLACE.gpa + AREAS + 8, 0x10_0fff)
        }),
    ];
    for (what, damage) in damages {
        let [guest, _] = guests(&areas(40), 16);
        damage(&guest);
        assert!(is_refused(&guest), "{what}");
    }
}

#[test]
fn lists_that_lead_back_or_do_not_ascend_are_refused() {
    for (index, next) in [(39, 0), (39, 39), (20, 3), (5, 4)] {
        let [_, guest] = guests(&areas(40), 16);
        guest.put_word(PLACE.gpa + AREAS + AREA * index + 64, area(&PLACE, next));
        assert!(is_refused(&guest), "{index}");
    }
}

/// One area, and the leaf or the link that leads to others, is damaged: the others are listed.
#[test]
fn what_is_not_damaged_of_a_map_is_listed() {
    let [tree, list] = guests(&areas(40), 16);
    for guest in [&tree, &list] {
        // The tree has the place of an area; the list ends there.
        guest.put(PLACE.gpa + AREAS + AREA * 7, &[0; 64]);
    }
    let map = read(&tree).unwrap();
    assert_eq!(bounds(&map), areas(40));
    let damaged: Vec<_> = map.mappings.iter().map(|mapping| mapping.is_damaged).collect();
    assert_eq!(damaged, (0..40).map(|index| index == 7).collect::<Vec<_>>());
    assert!(map.is_damaged() && !map.is_cut);
    let map = read(&list).unwrap();
    assert_eq!(bounds(&map), areas(40)[..7]);
    assert!(map.is_cut);
    // A leaf of zeros has no areas, and is not an empty leaf.
    let [guest, _] = guests(&areas(40), 16);
    guest.put(PLACE.gpa + NODES, &[0; 256]);
    let map = read(&guest).unwrap();
    assert!(map.is_cut && (1..40).contains(&map.mappings.len()), "{map:?}");
    assert!(bounds(&map).iter().all(|bounds| areas(40).contains(bounds)));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn trees_and_lists_of_any_shape_are_read(
        pages in proptest::collection::vec((0u64..3, 1u64..4), 0..300),
        slots in 2usize..17,
    ) {
        let mut at = 0x10_0000;
        let ranges: Vec<_> = pages
            .into_iter()
            .map(|(gap, len)| {
                let start = at + gap * 0x1000;
                at = start + len * 0x1000;
                (start, at)
            })
            .collect();
        for guest in guests(&ranges, slots) {
            let map = read(&guest).unwrap();
            prop_assert_eq!(bounds(&map), ranges.clone());
            prop_assert!(!map.is_torn);
        }
    }

    #[test]
    fn no_byte_of_a_map_does_harm(
        slots in 2usize..17,
        changes in proptest::collection::vec(
            (0usize..4, 0u64..0x1000, prop_oneof![
                Just(0u64),
                Just(u64::MAX),
                any::<u64>(),
                // A pointer to a node of some kind, or to an area.
                (0u64..64, 0u64..16).prop_map(|(node, kind)| (PLACE.gva + NODES + NODE * node) | kind << 3 | 6),
                (0u64..64).prop_map(|index| PLACE.gva + AREAS + AREA * index),
            ], 1usize..9),
            1..8,
        ),
    ) {
        for guest in guests(&areas(60), slots) {
            for (part, offset, value, len) in &changes {
                let at = match part {
                    0 => MM + offset % 64,
                    1 => AREAS + offset,
                    2 => NODES + offset,
                    // Whole words.
                    _ => NODES + offset / 8 * 8,
                };
                guest.put(PLACE.gpa + at, &value.to_le_bytes()[..*len]);
            }
            if let Ok(map) = read(&guest) {
                prop_assert!(map.mappings.iter().all(|mapping| mapping.start < mapping.end));
                prop_assert!(map.mappings.is_sorted_by(|one, two| one.end <= two.start));
            }
        }
    }
}
