// SPDX-License-Identifier: Apache-2.0 OR MIT
//! YARA rules, evaluated over all the memory that is searched, as YARA does for a process:
//! guest-physical addresses are the offsets.
//!
//! The engine is `boreal`: rules mean what they mean to YARA, it scans memory in pieces, and it
//! builds in seconds without a code generator. Modules that parse a file format need a whole file
//! and are not compiled in.
//!
//! The engine uses one thread. So many threads find first where strings match at all ([`strings`]),
//! without evaluating a condition; the rules are then evaluated over the memory around these places
//! alone. The conditions still see all memory.

mod compile;
mod memory;
mod strings;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use boreal::scanner::{CallbackEvents, EvaluatedRule, ScanCallbackResult, ScanEvent, ScanParams};
use boreal::{MetadataValue, Scanner};
use kvmmem::search::Atoms;
use serde::Serialize;

use super::places::{Piece, Places};
use super::source::Source;
use crate::number::{Address, hex};
use crate::range::GpaRange;
use compile::{Compiled, GATE, compile};
use memory::{Access, Pieces};

/// Bytes in which beginnings of matches are looked for at a time.
const PIECE: u64 = 256 << 10;

/// Bytes that are mapped and unmapped at a time: each time interrupts the other threads.
const BLOCK: u64 = 1 << 20;

/// How far a match may reach beyond its piece.
const REACH: u64 = 4096;

/// Bytes that are kept of each match.
const KEPT: usize = 64;

/// Matches of one string that are kept, unless there is a limit: the memory may hold any number.
const MATCHES: u32 = 1000;

/// Compiled rules.
pub(super) struct Rules {
    scanner: Scanner,
    /// Bytes that memory holds wherever a string matches, if they can be looked for.
    atoms: Option<Atoms>,
    /// Whether the engine may keep matches to itself.
    has_private: bool,
    /// Matches of one string that are kept.
    max: u32,
}

/// A rule that matched.
#[derive(Serialize)]
pub(super) struct Matched {
    pub(super) rule: String,
    namespace: String,
    tags: Vec<String>,
    meta: BTreeMap<String, Meta>,
    /// By address. Empty where the condition needs no string.
    pub(super) matches: Vec<StringMatch>,
}

/// The author's metadata of a rule.
#[derive(Serialize)]
#[serde(untagged)]
enum Meta {
    Text(String),
    Integer(i64),
    Boolean(bool),
}

/// Where a string of a rule matched.
#[derive(Serialize)]
pub(super) struct StringMatch {
    #[serde(flatten)]
    pub(super) address: Address,
    pub(super) string: String,
    len: usize,
    /// The first 64 bytes at most.
    #[serde(serialize_with = "as_hex")]
    pub(super) bytes: Box<[u8]>,
}

fn as_hex<S: serde::Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&hex(bytes))
}

impl Rules {
    /// Compiles files of rules. `max` matches of each string are kept. Warnings are logged.
    pub(super) fn compile(files: &[PathBuf], max: Option<u64>) -> Result<Self> {
        let Compiled { mut scanner, atoms, has_private } = compile(files)?;
        if scanner.rules().all(|rule| rule.name == GATE) {
            let files: Vec<String> = files.iter().map(|file| file.display().to_string()).collect();
            bail!("there is no rule in {}", files.join(", "));
        }
        let max = max.map_or(MATCHES, |max| u32::try_from(max).unwrap_or(u32::MAX));
        scanner.set_scan_params(
            ScanParams::default()
                .compute_full_matches(true)
                .match_max_length(KEPT)
                // One more, to know that there are more.
                .string_max_nb_matches(max.saturating_add(1))
                .process_memory(true)
                .callback_events(CallbackEvents::RULE_MATCH),
        );
        Ok(Self { scanner, atoms, has_private, max })
    }

    /// Evaluates the rules over the memory of `source`; `done` gets how many bytes of data a piece
    /// had, for each piece once; `address` makes an address of an offset. Returns the rules that
    /// matched, in their order.
    pub(super) fn run(
        &self,
        places: Places<'_>,
        threads: usize,
        source: &impl Source,
        done: impl Fn(u64) + Sync,
        address: impl Fn(u64) -> Address + Sync,
    ) -> Result<Vec<Matched>> {
        let all: Vec<Piece> = places.pieces(REACH, PIECE).collect();
        let fill = |piece: &Piece, buffer: &mut Vec<u8>| {
            buffer.resize(usize::try_from(end(piece) - piece.starts.start)?, 0);
            places.fill(piece.starts.start, buffer, |gpa, buffer| source.read(gpa, buffer))
        };
        let passes = |piece: &Piece| self.passes(piece, source);
        let access = Access { fill: &fill, passes: &passes };
        let mut matched = if threads == 1 || self.has_private {
            self.evaluate(places, &all, &all, access, &|piece| done(piece.len()), &address)?
        } else {
            let windows = strings::find(&self.scanner, places, threads, access, done)?;
            let around = Places { runs: places.runs, data: &windows };
            let some: Vec<Piece> = around.pieces(0, PIECE).collect();
            self.evaluate(places, &some, &all, access, &|_| {}, &address)?
        };
        for rule in &mut matched {
            rule.matches.retain(|found| {
                let start = found.address.get();
                !source.is_unreadable(&(start..start + found.len as u64))
            });
        }
        Ok(matched)
    }

    /// Whether no string matches in a piece, which is found out in place.
    fn passes(&self, piece: &Piece, source: &impl Source) -> bool {
        let (start, end) = (piece.starts.start, end(piece));
        // What is read as zeros may be a part of a match.
        let Some(atoms) =
            self.atoms.as_ref().filter(|_| piece.data.start <= start && end <= piece.data.end)
        else {
            return false;
        };
        // Pieces are gone through in order.
        if start % BLOCK < PIECE {
            let block = |from: u64| from.max(piece.data.start)..piece.data.end.min(from + BLOCK);
            let before = block(start.saturating_sub(BLOCK));
            if before.start < start {
                source.end(&(before.start..start));
            }
            source.begin(&block(start));
        }
        !source.may_hold(atoms, start, end - start)
    }

    /// Looks for strings in `some` pieces, and evaluates the conditions, which see `all` of them.
    fn evaluate(
        &self,
        places: Places<'_>,
        some: &[Piece],
        all: &[Piece],
        access: Access<'_>,
        done: memory::Done<'_>,
        address: &(dyn Fn(u64) -> Address + Sync),
    ) -> Result<Vec<Matched>> {
        let mut matched = Vec::new();
        memory::scan(Pieces::new(some, all, access, done), |memory| {
            let scan = self.scanner.scan_fragmented_with_callback(memory, |event| {
                if let ScanEvent::RuleMatch(rule) = event {
                    matched.push(self.matched(&rule, places.data, address));
                }
                ScanCallbackResult::Continue
            });
            scan.map_err(|error| anyhow!("the rules cannot be evaluated: {error}"))
        })?;
        Ok(matched)
    }

    fn matched(
        &self,
        rule: &EvaluatedRule<'_>,
        data: &[GpaRange],
        address: impl Fn(u64) -> Address,
    ) -> Matched {
        let text = |symbol| self.scanner.get_string_symbol(symbol).to_owned();
        let meta = rule.metadatas.iter().map(|meta| {
            let value = match meta.value {
                MetadataValue::Bytes(symbol) => Meta::Text(
                    String::from_utf8_lossy(self.scanner.get_bytes_symbol(symbol)).into_owned(),
                ),
                MetadataValue::Integer(number) => Meta::Integer(number),
                MetadataValue::Boolean(is) => Meta::Boolean(is),
            };
            (text(meta.name), value)
        });
        let found = |name: &str, found: &boreal::scanner::StringMatch| {
            let (gpa, len) = ((found.base + found.offset) as u64, found.length as u64);
            let part = data.get(data.partition_point(|part| part.end <= gpa));
            part.is_some_and(|part| part.start < gpa + len).then(|| StringMatch {
                address: address(gpa),
                string: format!("${name}"),
                len: found.length,
                bytes: found.data.clone(),
            })
        };
        let mut matches = Vec::new();
        for string in &rule.matches {
            let mut of_string: Vec<StringMatch> =
                string.matches.iter().filter_map(|place| found(string.name, place)).collect();
            of_string.sort_by_key(|found| found.address);
            // Pieces overlap.
            of_string.dedup_by_key(|found| found.address);
            let max = usize::try_from(self.max).unwrap_or(usize::MAX);
            if of_string.len() > max {
                tracing::warn!(
                    "more matches of ${} in rule {} than are kept: give --max",
                    string.name,
                    rule.name
                );
                of_string.truncate(max);
            }
            matches.append(&mut of_string);
        }
        matches.sort_by_key(|found| found.address);
        Matched {
            rule: rule.name.to_owned(),
            namespace: rule.namespace.to_owned(),
            tags: rule.tags.iter().map(|tag| text(*tag)).collect(),
            meta: meta.collect(),
            matches,
        }
    }
}

/// One after the last byte at which the piece is read.
fn end(piece: &Piece) -> u64 {
    piece.starts.end.saturating_add(REACH).min(piece.run.end)
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;
    use std::sync::atomic::{AtomicU64, Ordering};

    use kvmmem_memory::DumpFile;

    use super::super::source::{Copied, Dump};
    use super::*;
    use crate::number::Hex;
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
                    let slot = at
                        .checked_sub(gpa)
                        .and_then(|at| buffer.get_mut(usize::try_from(at).ok()?));
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
            let name = |rule: Matched| {
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
            let at = usize::try_from(places[number % places.len()]).unwrap()
                + number / places.len() * 40;
            let end = memory.len().min(at + text.len());
            if at < end {
                memory[at..end].copy_from_slice(&text[..end - at]);
            }
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), &memory).unwrap();
        let (file, unreadable) = (&DumpFile::open(file.path()).unwrap(), &Unreadable::default());
        let (dump, copied) = (Dump { file, unreadable }, Copied { memory: file, unreadable });
        let (run, parts) = (0..LEN, [0x1000..PIECE + 0x2000, 3 * PIECE..LEN]);
        let whole = from_ref(&run);
        let shown = |matched: &[Matched]| serde_json::to_string(matched).unwrap();
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
}
