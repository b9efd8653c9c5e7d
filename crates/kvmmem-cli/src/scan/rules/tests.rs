// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rules over memory that is made up.

use std::slice::from_ref;
use std::sync::atomic::{AtomicU64, Ordering};

use kvmmem_memory::DumpFile;

use super::*;
use crate::number::Hex;
use crate::scan::source::{CopySource, DumpSource};
use crate::unreadable::Unreadable;

fn rules(text: &str) -> Result<Rules> {
    let directory = tempfile::tempdir()?;
    let file = directory.path().join("rules.yar");
    std::fs::write(&file, text)?;
    Rules::compile(from_ref(&file), None)
}

/// The matches in memory that holds `needle` at these places.
fn places(rules: &Rules, runs: &[std::ops::Range<u64>], needles: &[u64]) -> Vec<(String, u64)> {
    let read = |gpa: u64, buffer: &mut [u8]| {
        buffer.fill(0);
        for place in needles {
            for (byte, at) in b"needle".iter().zip(*place..) {
                let slot =
                    at.checked_sub(gpa).and_then(|at| buffer.get_mut(usize::try_from(at).ok()?));
                if let Some(slot) = slot {
                    *slot = *byte;
                }
            }
        }
        Ok(())
    };
    let bytes = AtomicU64::new(0);
    let done = |more| {
        bytes.fetch_add(more, Ordering::Relaxed);
    };
    let run = |threads| {
        bytes.store(0, Ordering::Relaxed);
        let found = rules
            .run(Places { runs, data: runs }, threads, &read, done, |at| Address::Gpa(Hex(at)))
            .unwrap();
        assert_eq!(bytes.load(Ordering::Relaxed), crate::range::total(runs));
        let name = |rule: RuleMatch| {
            rule.matches.into_iter().map(move |found| (rule.rule.clone(), found.address.get()))
        };
        found.into_iter().flat_map(name).collect::<Vec<_>>()
    };
    let all = run(1);
    assert_eq!(run(3), all);
    all
}

#[test]
fn matches_over_two_pieces_are_found_once() {
    let rules = rules("rule a { strings: $s = \"needle\" condition: #s >= 4 }").unwrap();
    let run = 0x1000..3 * PIECE + 0x1000;
    let needles = [0x1000, PIECE + 0xffd, 2 * PIECE + 0x1000, 3 * PIECE + 0xffa];
    let expected: Vec<_> = needles.iter().map(|place| ("a".to_owned(), *place)).collect();
    assert_eq!(places(&rules, from_ref(&run), &needles), expected);
    // Not across a hole.
    let runs = [0..0x1000, 0x2000..0x3000];
    assert_eq!(places(&rules, &runs, &[0xffd, 0x1ffd]), []);
}

#[test]
fn rules_mean_the_same_with_many_threads() {
    let rules = rules(
        "import \"math\"
         global rule every { condition: true }
         private rule hidden { strings: $a = \"nee\" condition: $a }
         rule uses_hidden { strings: $a = \"needle\" private condition: hidden and $a }
         rule word { strings: $a = \"needle\" fullword $b = \"dle\" condition: any of them }
         rule long { strings: $a = /needle.{2,300}needle/s condition: $a }
         rule exact { strings: $a = \"needle\" condition: #a == 7 and @a[7] == 0xc0000 }
         rule reads { strings: $a = \"xxxx\" condition: not $a and uint32(0xc0000) == 0x6465656e and math.min(1, 2) == 1 }",
    );
    let rules = rules.unwrap();
    assert!(rules.has_private);
    let run = 0..4 * PIECE;
    let needles = [0, 6, 0x1000, 0x1100, PIECE - 3, 2 * PIECE, 3 * PIECE];
    let with_private = places(&rules, from_ref(&run), &needles);
    assert_eq!(with_private.iter().filter(|(rule, _)| rule == "exact").count(), 7);
    assert!(with_private.iter().any(|(rule, _)| rule == "long"));
    // The same by the way that looks for strings first.
    let rules = Rules { has_private: false, ..rules };
    assert_eq!(places(&rules, from_ref(&run), &needles), with_private);
}

#[test]
fn matches_of_two_runs_that_are_close_are_all_found() {
    let rules = rules("rule a { strings: $s = \"needle\" condition: any of them }").unwrap();
    let runs = [0..0x2000, 0x2010..0x8_0000];
    let both = [("a".to_owned(), 0x1f00), ("a".to_owned(), 0x2100)];
    assert_eq!(places(&rules, &runs, &[0x1f00, 0x2100]), both);
}

#[test]
fn matches_of_two_runs_may_fill_pieces() {
    let rules = rules("rule a { strings: $s = \"needle\" condition: any of them }").unwrap();
    let runs = [0..0x2000, 0x2010..0x8_0000];
    let many: Vec<u64> = (0x1f00..0x6_0000).step_by(0x1000).collect();
    assert_eq!(places(&rules, &runs, &many).len(), many.len());
}

#[test]
fn a_condition_sees_all_the_memory_and_its_addresses() {
    let rules = rules(
        "rule far { strings: $a = \"needle\" condition: #a == 2 and @a[2] == 0x80000ff0 }
         rule word { condition: uint16(0x80000ff0) == 0x656e }
         rule nothing { strings: $a = \"needles\" condition: $a }",
    );
    let runs = [0..0x1000, 0x8000_0000..0x8000_1000];
    let rules = rules.unwrap();
    let found = places(&rules, &runs, &[0x10, 0x8000_0ff0]);
    assert_eq!(found, [("far".to_owned(), 0x10), ("far".to_owned(), 0x8000_0ff0)]);
}

#[test]
fn a_search_in_place_finds_what_one_in_copies_does() {
    const LEN: u64 = 6 * PIECE;
    let texts: [&[u8]; 8] = [
        b"Needle",
        b"n\0E\0e\0d\0l\0e\0",
        b"\x48\x89\x5c\x24\x18",
        b"ab",
        b"lddfmd",
        b"bob@host.example",
        b"key=1234",
        b"bmVlZGxl",
    ];
    let mut state = 1u32;
    let mut memory: Vec<u8> = (0..LEN)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            // Bytes that are in no text.
            0x80 | state.to_le_bytes()[3]
        })
        .collect();
    // At the beginnings and ends of pieces, and in some of them alone.
    let places = [0, PIECE - 3, PIECE + 0xffe, 2 * PIECE - 1, 5 * PIECE + 100, LEN - 16];
    for (number, text) in texts.iter().cycle().take(3 * places.len()).enumerate() {
        let at =
            usize::try_from(places[number % places.len()]).unwrap() + number / places.len() * 40;
        let end = memory.len().min(at + text.len());
        if at < end {
            memory[at..end].copy_from_slice(&text[..end - at]);
        }
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), &memory).unwrap();
    let (file, unreadable) = (&DumpFile::open(file.path()).unwrap(), &Unreadable::default());
    let (dump, copied) = (DumpSource { file, unreadable }, CopySource { memory: file, unreadable });
    let (run, parts) = (0..LEN, [0x1000..PIECE + 0x2000, 3 * PIECE..LEN]);
    let whole = from_ref(&run);
    let shown = |matched: &[RuleMatch]| serde_json::to_string(matched).unwrap();
    let mut found = 0;
    for strings in [
        "$a = \"needle\" nocase wide ascii",
        "$a = \"needle\" xor",
        "$a = \"needle\" base64",
        "$a = { 48 89 ?? 24 18 }",
        "$a = { 4? 89 ( 5c | 5d ) }",
        "$a = \"ab\"",
        "$a = /[a-z]{3,20}@[a-z]{3,20}\\.example/ nocase",
        "$a = /key=[0-9]+/ $b = \"nothing of the kind\"",
        "$a = \"b\"",
        "$a = /[0-9]{4}/",
    ] {
        let rules =
            rules(&format!("rule a {{ strings: {strings} condition: any of them }}")).unwrap();
        for (data, threads) in [(whole, 2), (&parts[..], 1)] {
            let places = Places { runs: whole, data };
            let run = |in_place: bool| {
                let address = |at| Address::Gpa(Hex(at));
                let matched = match in_place {
                    true => rules.run(places, threads, &dump, |_| {}, address),
                    false => rules.run(places, threads, &copied, |_| {}, address),
                };
                matched.unwrap()
            };
            let expected = run(false);
            assert_eq!(shown(&run(true)), shown(&expected), "{strings} {threads}");
            found += expected.len();
        }
    }
    assert!(found >= 12, "{found}");
    // Most pieces were not copied.
    let rules = rules("rule a { strings: $a = \"needle\" condition: $a }").unwrap();
    let all: Vec<Piece> = Places { runs: whole, data: whole }.pieces(REACH, PIECE).collect();
    let passed = all.iter().filter(|piece| rules.passes(piece, &dump)).count();
    assert_eq!(passed, 2);
}

#[test]
fn no_more_matches_are_kept_than_wanted() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("rules.yar");
    let text = "rule a { strings: $any = /.*/ $text = \"needle\" condition: any of them }";
    std::fs::write(&file, text).unwrap();
    assert!(Rules::compile(from_ref(&file), None).is_ok());
    let run = 0..3 * PIECE;
    for max in [1, 2, 5] {
        let rules = Rules::compile(from_ref(&file), Some(max)).unwrap();
        let found = places(&rules, from_ref(&run), &[0x10, PIECE, 2 * PIECE]);
        let expected = max + max.min(3);
        assert_eq!(found.len() as u64, expected, "{found:?}");
    }
    std::fs::write(&file, "").unwrap();
    let error = Rules::compile(from_ref(&file), None).err().unwrap().to_string();
    assert!(error.starts_with("there is no rule in"), "{error}");
}

#[test]
fn memory_that_cannot_be_read_ends_the_scan() {
    let rules = rules("rule a { strings: $s = \"x\" condition: $s }").unwrap();
    let run = 0..4 * PIECE;
    let read = |gpa: u64, _: &mut [u8]| {
        anyhow::ensure!(gpa < 2 * PIECE, "lost");
        Ok(())
    };
    for threads in [1, 2] {
        let error = rules.run(
            Places { runs: from_ref(&run), data: from_ref(&run) },
            threads,
            &read,
            |_| {},
            |at| Address::Gpa(Hex(at)),
        );
        assert_eq!(error.err().unwrap().to_string(), "lost");
    }
}
