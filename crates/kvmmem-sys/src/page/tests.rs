// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pages, and accesses to them.

use super::*;

#[test]
fn a_new_page_is_aligned_and_zero() {
    let page = Page::new().unwrap();
    assert!(page.address().is_multiple_of(PAGE_SIZE));
    let mut bytes = [0xffu8; PAGE_SIZE];
    page.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0; PAGE_SIZE]);
}

#[test]
fn every_offset_and_length_reads_back() {
    let page = Page::new().unwrap();
    let pattern: Vec<u8> = (0..PAGE_SIZE).map(|i| u8::try_from(i % 251).unwrap()).collect();
    for offset in (0..17).chain(PAGE_SIZE - 40..=PAGE_SIZE) {
        for len in (0..40).filter(|len| offset + len <= PAGE_SIZE) {
            page.write(0, &[0xee; PAGE_SIZE]).unwrap();
            page.write(offset, &pattern[offset..offset + len]).unwrap();
            let mut all = [0; PAGE_SIZE];
            page.read(0, &mut all).unwrap();
            assert_eq!(all[offset..offset + len], pattern[offset..offset + len]);
            assert!(all[..offset].iter().chain(&all[offset + len..]).all(|&byte| byte == 0xee));
            let mut part = vec![0; len];
            page.read(offset, &mut part).unwrap();
            assert_eq!(part, pattern[offset..offset + len]);
        }
    }
}

#[test]
fn words_and_bytes_are_the_same_memory() {
    let page = Page::new().unwrap();
    page.write_u64(PAGE_SIZE - 8, 0x0123_4567_89ab_cdef).unwrap();
    let mut bytes = [0; 8];
    page.read(PAGE_SIZE - 8, &mut bytes).unwrap();
    assert_eq!(u64::from_ne_bytes(bytes), 0x0123_4567_89ab_cdef);
    assert_eq!(page.read_u64(PAGE_SIZE - 8).unwrap(), 0x0123_4567_89ab_cdef);
}

#[test]
fn access_outside_is_refused() {
    let page = Page::new().unwrap();
    assert!(matches!(page.read(PAGE_SIZE, &mut [0]), Err(PageError::Outside { .. })));
    assert!(matches!(page.write(usize::MAX, &[0, 0]), Err(PageError::Outside { .. })));
    assert!(matches!(page.read_u64(PAGE_SIZE - 7), Err(PageError::Outside { .. })));
    assert!(matches!(page.write_u64(4, 0), Err(PageError::Unaligned { offset: 4 })));
}

/// The lines of smaps about the mapping that holds `address`, if any does.
fn smaps_of(address: usize) -> Option<String> {
    let is_start = |line: &str| {
        let (start, end) = line.split_whitespace().next()?.split_once('-')?;
        let parse = |text| usize::from_str_radix(text, 16).ok();
        Some(parse(start)?..parse(end)?)
    };
    let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
    let lines: Vec<&str> = smaps
        .lines()
        .skip_while(|line| !is_start(line).is_some_and(|range| range.contains(&address)))
        .collect();
    let (first, rest) = lines.split_first()?;
    let rest = rest.iter().take_while(|line| is_start(line).is_none()).copied();
    Some(std::iter::once(*first).chain(rest).collect::<Vec<_>>().join("\n"))
}

#[test]
fn drop_unmaps() {
    // Another thread of the test may take the address again at once: then try once more.
    let unmapped = (0..100).any(|_| {
        let page = Page::new().unwrap();
        let address = page.address();
        assert!(smaps_of(address).is_some());
        drop(page);
        smaps_of(address).is_none()
    });
    assert!(unmapped);
}

#[test]
fn many_pages_need_few_mappings() {
    let count = || std::fs::read_to_string("/proc/self/maps").unwrap().lines().count();
    let before = count();
    let pages: Vec<Page> = (0..2000).map(|_| Page::new().unwrap()).collect();
    // vm.max_map_count must not bound how many pages a tool can map. Other threads of the test
    // map things as well.
    assert!(count() < before + 500, "{} mappings for {} pages", count() - before, pages.len());
}

#[test]
fn leak_does_not_unmap() {
    let page = Page::new().unwrap();
    let address = page.address();
    page.leak();
    assert!(smaps_of(address).is_some());
}

#[test]
fn fork_and_core_dump_pass_the_page_by() {
    let page = Page::new().unwrap();
    let smaps = smaps_of(page.address()).unwrap();
    let flags = smaps.lines().find(|line| line.starts_with("VmFlags:")).unwrap();
    assert!(flags.contains(" wf") && flags.contains(" dd"), "{flags}");
}
