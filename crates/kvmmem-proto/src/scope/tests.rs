// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Scopes against memory maps.

use super::*;
use proptest::prelude::*;

fn map() -> MemoryMap {
    let region = |gpa, len| Region { gpa, len, offset: gpa, file: 0 };
    MemoryMap::new(vec![region(0, 0x4000), region(0x10_0000, 0x10_0000)]).unwrap()
}

fn scope(spans: &[(u64, u64)]) -> Scope {
    let spans = spans.iter().map(|(gpa, len)| Span { gpa: *gpa, len: *len }).collect();
    Scope { rights: Rights::ReadOnly, spans: Some(spans) }
}

#[test]
fn a_scope_cuts_the_memory_map() {
    let scope = scope(&[(0x1000, 0x1000), (0x3000, 0x10_0000), (0x18_0000, 0x100_0000)]);
    scope.check(&map()).unwrap();
    let region = |gpa, len| Region { gpa, len, offset: gpa, file: 0 };
    let expected = [
        region(0x1000, 0x1000),
        region(0x3000, 0x1000),
        region(0x10_0000, 0x3000),
        region(0x18_0000, 0x8_0000),
    ];
    assert_eq!(scope.regions(&map()), expected);
    assert!(!scope.contains(0xfff) && scope.contains(0x1000) && scope.contains(0x1fff));
    assert!(!scope.contains(0x2000) && scope.contains(0x4000) && !scope.contains(u64::MAX));
    assert_eq!(Scope::whole(Rights::ReadWrite).regions(&map()), map().regions());
    assert!(Scope::whole(Rights::ReadWrite).contains(u64::MAX));
}

#[test]
fn rights_are_narrowed_and_never_widened() {
    let rights = |has, asked| Scope::whole(has).at_most(asked).rights;
    assert_eq!(rights(Rights::ReadWrite, Rights::ReadOnly), Rights::ReadOnly);
    assert_eq!(rights(Rights::ReadOnly, Rights::ReadWrite), Rights::ReadOnly);
    assert_eq!(rights(Rights::ReadWrite, Rights::ReadWrite), Rights::ReadWrite);
}

#[test]
fn what_is_to_be_reached_is_checked_against_scope_and_memory() {
    let span = |gpa, len| Span { gpa, len };
    let scope = scope(&[(0x1000, 0x1000), (0x10_0000, 0x1000)]);
    let reaches =
        |spans: &[Span]| scope.check_reaches(spans, &map()).map_err(|error| error.to_string());
    assert_eq!(reaches(&[]), Ok(()));
    assert_eq!(reaches(&[span(0x8000, 0x10_0000), span(0, u64::MAX), span(0x1fff, 1)]), Ok(()));
    let refused = |gpa, len, range: &str| {
        let words =
            "holds no memory that the token opens, which is at 0x1000..0x2000, 0x100000..0x101000";
        let error = format!("range {range} {words}; the token was not used");
        assert_eq!(reaches(&[span(0x1000, 1), span(gpa, len)]), Err(error));
    };
    refused(0, 0x1000, "0x0..0x1000");
    refused(0x2000, 0x1000, "0x2000..0x3000");
    refused(0x1000, 0, "0x1000..0x1000");
    refused(0x1000, u64::MAX, "0x1000 (length 0xffffffffffffffff)");
    let most = vec![span(0x1000, 1); MAX_SPANS];
    assert_eq!(reaches(&most), Ok(()));
    assert!(reaches(&[&most[..], &most[..1]].concat()).unwrap_err().contains("65 ranges"));
    let elsewhere = Scope { spans: Some(vec![span(0x8000, 0x1000)]), ..scope };
    let error = elsewhere.check_reaches(&most, &map()).unwrap_err().to_string();
    assert!(error.contains("which is nowhere"), "{error}");
}

#[test]
fn bad_spans_are_refused_by_name() {
    let many: Vec<(u64, u64)> = (0..65).map(|n| (n * 0x2000, 0x1000)).collect();
    let cases: Vec<(Scope, &str)> = vec![
        (scope(&[]), "no range"),
        (scope(&many), "65 ranges"),
        (scope(&[(0, 0)]), "0x0..0x0 is empty"),
        (scope(&[(1, 0x1000)]), "0x1..0x1001 is empty or not page-aligned"),
        (scope(&[(0x1000, 0xfff)]), "multiples of 0x1000"),
        (scope(&[(!0xfff, 0x1000)]), "0xfffffffffffff000 (length 0x1000) ends out of range"),
        (scope(&[(0x1000, !0xfff)]), "ends out of range"),
        (scope(&[(0, 0x2000), (0x1000, 0x1000)]), "0x1000..0x2000 overlaps"),
        (scope(&[(0x1000, 0x1000), (0, 0x1000)]), "ascending"),
        (
            scope(&[(0x4000, 0x1000)]),
            "0x4000..0x5000 holds none of the target's RAM, which is at 0x0..0x4000, 0x100000..0x200000",
        ),
    ];
    for (scope, words) in cases {
        let error = scope.check(&map()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
    }
    let regions =
        (0..64).map(|n| Region { gpa: n << 13, len: 0x1000, offset: n << 13, file: 0 }).collect();
    let holes = MemoryMap::new(regions).unwrap();
    let halves: Vec<(u64, u64)> = vec![(0, 0x1000), (0x2000, 64 << 13)];
    assert_eq!(scope(&halves).check(&holes), Ok(()));
    let large = MemoryMap::new(vec![Region { gpa: 0, len: 64 << 13, offset: 0, file: 0 }]).unwrap();
    let pages: Vec<(u64, u64)> = (0..64).map(|n| (n << 13, 0x1000)).collect();
    assert_eq!(scope(&pages).check(&large), Ok(()));
}

proptest! {
    #[test]
    fn each_page_is_in_the_regions_if_it_is_ram_and_in_the_scope(
        spans in proptest::collection::vec((0u64..0x20, 1u64..0x20), 0..6),
        pages in proptest::collection::vec((0u64..8, 1u64..8), 1..6),
    ) {
        let ascending = |list: &[(u64, u64)]| {
            let mut at = 0;
            let place = |(gap, len): &(u64, u64)| {
                let gpa = at + gap;
                at = gpa + len;
                (gpa << 12, len << 12)
            };
            list.iter().map(place).collect::<Vec<_>>()
        };
        let scope = scope(&ascending(&spans));
        let regions = ascending(&pages).into_iter().map(|(gpa, len)| Region { gpa, len, offset: gpa + 0x1000, file: 1 });
        let map = MemoryMap::new(regions.collect()).unwrap();
        let cut = scope.regions(&map);
        prop_assert!(cut.iter().zip(cut.iter().skip(1)).all(|(a, b)| a.gpa + a.len <= b.gpa));
        for page in (0..0x200u64).map(|gfn| gfn << 12) {
            let found = cut.iter().find(|r| (r.gpa..r.gpa + r.len).contains(&page));
            let expected = map.resolve(page).filter(|_| scope.contains(page));
            prop_assert_eq!(found.map(|r| (r.file, r.offset + (page - r.gpa))), expected);
        }
    }

    #[test]
    fn any_numbers_are_checked_without_harm(numbers in proptest::collection::vec(any::<(u64, u64)>(), 0..4), gpa: u64) {
        let scope = scope(&numbers);
        let _ = scope.check(&map());
        let _ = scope.contains(gpa);
        let _ = scope.regions(&map());
        let _ = scope.check_reaches(scope.spans.as_deref().unwrap_or_default(), &map());
    }
}
