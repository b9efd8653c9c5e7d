// SPDX-License-Identifier: Apache-2.0 OR MIT
//! YARA rules, evaluated over all the memory that is searched, as YARA does for a process: guest-physical addresses are the
//! offsets.
//!
//! The engine is `boreal`: rules mean what they mean to YARA, it scans memory in pieces, and it builds in seconds without
//! a code generator. Modules that parse a file format need a whole file and are not compiled in.

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use anyhow::{Error, Result, anyhow, bail};
use boreal::compiler::Compiler;
use boreal::memory::{FragmentedMemory, MemoryParams, Region, RegionDescription};
use boreal::scanner::{CallbackEvents, EvaluatedRule, ScanCallbackResult, ScanEvent, ScanParams};
use boreal::{MetadataValue, Scanner};
use serde::Serialize;

use super::places::{Piece, Places};
use crate::failure::escape;
use crate::number::{Hex, hex};
use crate::range::GpaRange;

/// Bytes in which beginnings of matches are looked for at a time.
const PIECE: u64 = 4 << 20;

/// How far a match may reach beyond its piece.
const REACH: u64 = 4096;

/// Bytes that are kept of each match.
const KEPT: usize = 64;

/// Matches of one string that are kept, unless there is a limit: the memory may hold any number.
const MATCHES: u32 = 1000;

/// Compiled rules.
pub(super) struct Rules(Scanner);

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

/// What the author says about a rule.
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
    pub(super) gpa: Hex,
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
    /// Compiles files of rules. Each file is a namespace by its name. Warnings are logged.
    pub(super) fn compile(files: &[PathBuf], max: Option<u64>) -> Result<Self> {
        let mut compiler = Compiler::new();
        for file in files {
            let namespace = file.file_stem().unwrap_or_default().to_string_lossy();
            match compiler.add_rules_file_in_namespace(file, &namespace) {
                Ok(status) => status.warnings().for_each(|warning| tracing::warn!("{}", lines(warning))),
                Err(error) => bail!(explain(&error)),
            }
        }
        let mut scanner = compiler.finalize();
        if scanner.rules().next().is_none() {
            bail!(
                "there is no rule in {}",
                files.iter().map(|file| file.display().to_string()).collect::<Vec<_>>().join(", ")
            );
        }
        let limit = max.map_or(MATCHES, |max| u32::try_from(max).unwrap_or(u32::MAX));
        scanner.set_scan_params(
            ScanParams::default()
                .compute_full_matches(true)
                .match_max_length(KEPT)
                .string_max_nb_matches(limit)
                .process_memory(true)
                .callback_events(CallbackEvents::RULE_MATCH | CallbackEvents::STRING_REACHED_MATCH_LIMIT),
        );
        Ok(Self(scanner))
    }

    /// Evaluates the rules; `read` fills a buffer with data, `done` gets how many bytes of data a piece had, for each
    /// piece once. Returns the rules that matched, in their order.
    pub(super) fn run(
        &self,
        places: Places<'_>,
        read: impl Fn(u64, &mut [u8]) -> Result<()> + Sync,
        done: impl Fn(u64) + Sync,
    ) -> Result<Vec<Matched>> {
        let pieces: Vec<Piece> = places.pieces(REACH, PIECE).collect();
        let failed = Mutex::new(None);
        let memory = Pieces {
            fill: &|piece: &Piece, buffer: &mut Vec<u8>| {
                buffer.resize(usize::try_from(end(piece) - piece.starts.start)?, 0);
                places.fill(piece.starts.start, buffer, &read)
            },
            done: &done,
            failed: &failed,
            pieces: &pieces,
            next: 0,
            read: 0,
            buffer: Vec::new(),
        };
        let mut matched = Vec::new();
        let scan = self.0.scan_fragmented_with_callback(memory, |event| {
            match event {
                ScanEvent::RuleMatch(rule) => matched.push(self.matched(&rule, places.data)),
                ScanEvent::StringReachedMatchLimit(string) => tracing::warn!(
                    "more matches of {} in rule {} than are kept: give --max",
                    string.string_name,
                    string.rule_name
                ),
                _ => {}
            }
            ScanCallbackResult::Continue
        });
        if let Some(error) = failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
            return Err(error);
        }
        scan.map_err(|error| anyhow!("the rules cannot be evaluated: {error}"))?;
        Ok(matched)
    }

    fn matched(&self, rule: &EvaluatedRule<'_>, data: &[GpaRange]) -> Matched {
        let text = |symbol| self.0.get_string_symbol(symbol).to_owned();
        let meta = rule.metadatas.iter().map(|meta| {
            let value = match meta.value {
                MetadataValue::Bytes(symbol) => {
                    Meta::Text(String::from_utf8_lossy(self.0.get_bytes_symbol(symbol)).into_owned())
                }
                MetadataValue::Integer(number) => Meta::Integer(number),
                MetadataValue::Boolean(is) => Meta::Boolean(is),
            };
            (text(meta.name), value)
        });
        let found = |name: &str, found: &boreal::scanner::StringMatch| {
            let (gpa, len) = ((found.base + found.offset) as u64, found.length as u64);
            let part = data.get(data.partition_point(|part| part.end <= gpa));
            part.is_some_and(|part| part.start < gpa + len).then(|| StringMatch {
                gpa: Hex(gpa),
                string: format!("${name}"),
                len: found.length,
                bytes: found.data.clone(),
            })
        };
        let strings = rule.matches.iter();
        let mut matches: Vec<StringMatch> = strings
            .flat_map(|string| string.matches.iter().filter_map(|place| found(string.name, place)))
            .collect();
        matches.sort_by_key(|found| found.gpa.0);
        matches.dedup_by(|one, other| one.gpa == other.gpa && one.string == other.string);
        Matched {
            rule: rule.name.to_owned(),
            namespace: rule.namespace.to_owned(),
            tags: rule.tags.iter().map(|tag| text(*tag)).collect(),
            meta: meta.collect(),
            matches,
        }
    }
}

/// Why rules do not compile, and what to do where a module is missing.
fn explain(error: &boreal::compiler::AddRuleError) -> String {
    let text = lines(error);
    let is_format = |name: &&str| text.ends_with(&format!("unknown import {name}"));
    match ["pe", "elf", "macho", "dotnet", "dex", "magic", "cuckoo"].into_iter().find(is_format) {
        Some(name) => format!(
            "{text}; module {name} parses a whole file, which memory does not hold: use rules without it"
        ),
        None => text,
    }
}

/// The message, each line without what a terminal would not show.
fn lines(message: &impl fmt::Display) -> String {
    message.to_string().lines().map(escape).collect::<Vec<_>>().join("\n")
}

/// One after the last byte at which the piece is read.
fn end(piece: &Piece) -> u64 {
    piece.starts.end.saturating_add(REACH).min(piece.limit)
}

/// The memory, a piece at a time.
struct Pieces<'a> {
    fill: &'a (dyn Fn(&Piece, &mut Vec<u8>) -> Result<()> + Sync),
    done: &'a (dyn Fn(u64) + Sync),
    failed: &'a Mutex<Option<Error>>,
    pieces: &'a [Piece],
    /// Number of the piece that is listed next.
    next: usize,
    /// How many pieces have been read so far.
    read: usize,
    buffer: Vec<u8>,
}

impl fmt::Debug for Pieces<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pieces")
            .field("count", &self.pieces.len())
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

impl FragmentedMemory for Pieces<'_> {
    fn next(&mut self, _: &MemoryParams) -> Option<RegionDescription> {
        // What cannot be read once ends the scan.
        if self.failed.lock().unwrap_or_else(PoisonError::into_inner).is_some() {
            return None;
        }
        let piece = self.pieces.get(self.next)?;
        self.next += 1;
        let start = usize::try_from(piece.starts.start).ok()?;
        Some(RegionDescription { start, length: usize::try_from(end(piece) - piece.starts.start).ok()? })
    }

    fn fetch(&mut self, _: &MemoryParams) -> Option<Region<'_>> {
        let piece = self.pieces.get(self.next.checked_sub(1)?)?;
        if let Err(error) = (self.fill)(piece, &mut self.buffer) {
            *self.failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            return None;
        }
        if self.next > self.read {
            self.read = self.next;
            (self.done)(piece.starts.end - piece.starts.start.max(piece.data));
        }
        Some(Region { start: usize::try_from(piece.starts.start).ok()?, mem: &self.buffer })
    }

    fn reset(&mut self) {
        self.next = 0;
    }
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

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
                    let slot = at.checked_sub(gpa).and_then(|at| buffer.get_mut(usize::try_from(at).ok()?));
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
        let found = rules.run(Places { runs, data: runs }, read, done).unwrap();
        assert_eq!(bytes.into_inner(), crate::range::total(runs));
        let all = found
            .into_iter()
            .flat_map(|rule| rule.matches.into_iter().map(move |found| (rule.rule.clone(), found.gpa.0)));
        all.collect()
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
    fn what_does_not_compile_is_said_with_its_place() {
        for (text, words) in [
            ("rule a { condition: $b }", "rules.yar:1:"),
            ("", "there is no rule in"),
            ("import \"pe\"\nrule a { condition: pe.is_pe }", "module pe parses a whole file"),
            ("import \"nothing\"\nrule a { condition: true }", "unknown import nothing"),
            ("rule \u{1b}[2J { condition: true }", "rules.yar:1:"),
        ] {
            let error = rules(text).err().unwrap().to_string();
            assert!(error.contains(words) && !error.contains('\u{1b}'), "{error}");
        }
        assert!(Rules::compile(&["/nonexistent.yar".into()], None).is_err());
    }

    #[test]
    fn memory_that_cannot_be_read_ends_the_scan() {
        let rules = rules("rule a { strings: $s = \"x\" condition: $s }").unwrap();
        let run = 0..4 * PIECE;
        let read = |gpa: u64, _: &mut [u8]| {
            anyhow::ensure!(gpa < 2 * PIECE, "lost");
            Ok(())
        };
        let error = rules.run(Places { runs: from_ref(&run), data: from_ref(&run) }, read, |_| {});
        assert_eq!(error.err().unwrap().to_string(), "lost");
    }
}
