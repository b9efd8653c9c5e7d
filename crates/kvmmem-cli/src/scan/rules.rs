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
mod includes;
mod memory;
mod reach;
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
use compile::{CompiledRules, GATE, compile};
use memory::{Access, Pieces};
use reach::{PIECE, REACH, end};

/// Bytes that are mapped and unmapped at a time: each time interrupts the other threads.
const BLOCK: u64 = 1 << 20;

/// Bytes that are kept of each match.
const KEPT: usize = 64;

/// Matches of one string that are kept, unless there is a limit: the memory may hold any number.
const MATCHES: u32 = 1000;

/// CompiledRules rules.
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
pub(super) struct RuleMatch {
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
        let CompiledRules { mut scanner, atoms, has_private } = compile(files)?;
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
    ) -> Result<Vec<RuleMatch>> {
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
    ) -> Result<Vec<RuleMatch>> {
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
    ) -> RuleMatch {
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
        RuleMatch {
            rule: rule.name.to_owned(),
            namespace: rule.namespace.to_owned(),
            tags: rule.tags.iter().map(|tag| text(*tag)).collect(),
            meta: meta.collect(),
            matches,
        }
    }
}

#[cfg(test)]
mod tests;
