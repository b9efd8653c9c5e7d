// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where strings of rules match at all, found by many threads: the engine scans each batch of
//! memory by itself, with all conditions off.

use std::ops::ControlFlow;

use anyhow::{Result, anyhow};
use boreal::Scanner;
use boreal::scanner::{CallbackEvents, FragmentedScanMode, ScanCallbackResult, ScanEvent};

use super::compile::GATE_SYMBOL;
use super::memory::{self, Access, Pieces};
use super::reach::{PIECE, REACH};
use crate::parallel::{Sink, in_order};
use crate::range::GpaRange;
use crate::scan::places::{Piece, Places};

/// Bytes that a thread takes at a time.
const BATCH: u64 = 8 << 20;

/// What a batch had.
struct BatchWindows {
    windows: Vec<GpaRange>,
    bytes: u64,
}

/// The memory around each match of a string: ascending, and so far apart that no match is seen from
/// two of them. Of a string that matches more often in a batch than is kept of all its matches, the
/// first ones are enough.
pub(super) fn find(
    scanner: &Scanner,
    places: Places<'_>,
    threads: usize,
    access: Access<'_>,
    done: impl Fn(u64),
) -> Result<Vec<GpaRange>> {
    let mut scanner = scanner.clone();
    scanner
        .define_symbol(GATE_SYMBOL, false)
        .map_err(|error| anyhow!("the rules lack their symbol: {error:?}"))?;
    let params = scanner.scan_params().clone();
    scanner.set_scan_params(
        params
            .match_max_length(0)
            .include_not_matched_rules(true)
            .fragmented_scan_mode(FragmentedScanMode::fast())
            .callback_events(CallbackEvents::RULE_NO_MATCH),
    );
    let mut windows: Vec<GpaRange> = Vec::new();
    let work = |batch: Vec<Piece>, sink: &Sink<BatchWindows>| {
        let windows = in_batch(&scanner, &batch, places.runs, access)?;
        sink.send(BatchWindows { windows, bytes: batch.iter().map(Piece::len).sum() })
    };
    in_order(threads, places.batches(REACH, PIECE, BATCH), work, |found| {
        found.windows.into_iter().for_each(|window| add(&mut windows, window, places.runs));
        done(found.bytes);
        Ok(ControlFlow::Continue(()))
    })?;
    Ok(windows)
}

/// The memory around each match in a batch.
fn in_batch(
    scanner: &Scanner,
    batch: &[Piece],
    runs: &[GpaRange],
    access: Access<'_>,
) -> Result<Vec<GpaRange>> {
    let mut places: Vec<GpaRange> = Vec::new();
    memory::scan(Pieces::new(batch, batch, access, &|_| {}), |memory| {
        let scan = scanner.scan_fragmented_with_callback(memory, |event| {
            if let ScanEvent::RuleNoMatch(rule) = event {
                let matches = rule.matches.iter().flat_map(|string| &string.matches);
                places.extend(matches.map(|found| {
                    let start = (found.base + found.offset) as u64;
                    start..start + found.length as u64
                }));
            }
            ScanCallbackResult::Continue
        });
        scan.map_err(|error| anyhow!("the rules' strings cannot be looked for: {error}"))
    })?;
    places.sort_unstable_by_key(|place| place.start);
    let mut windows = Vec::new();
    for place in places {
        let run = run_of(place.start, runs).unwrap_or(&(0..u64::MAX));
        let start = place.start.saturating_sub(REACH).max(run.start);
        add(&mut windows, start..place.end.saturating_add(REACH).min(run.end), runs);
    }
    Ok(windows)
}

/// Adds a window that does not begin before the last one, by more than their overlap. A window
/// stays within one of the `runs`, since a piece does.
fn add(windows: &mut Vec<GpaRange>, window: GpaRange, runs: &[GpaRange]) {
    match windows.last_mut() {
        // A piece of the last one reaches that far.
        Some(last)
            if window.start < last.end.saturating_add(REACH)
                && run_of(last.start, runs) == run_of(window.start, runs) =>
        {
            last.start = last.start.min(window.start);
            last.end = last.end.max(window.end);
        }
        _ => windows.push(window),
    }
}

/// The run that holds `gpa`.
fn run_of(gpa: u64, runs: &[GpaRange]) -> Option<&GpaRange> {
    runs.get(runs.partition_point(|run| run.end <= gpa)).filter(|run| run.start <= gpa)
}
