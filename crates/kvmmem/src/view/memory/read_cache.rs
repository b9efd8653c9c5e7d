// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Mappings of all that a view reaches, kept for vectored reads, which need no system call then.
//!
//! A page that the target has never touched has no memory, and reading it through a mapping would
//! allocate some, on the target's account. So a page is read from the file at first. Only one that
//! is read again is looked up, once a second at most, and read through the mapping where it is in
//! memory. Many pages in a row, as a search reads them, are looked up together.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::time::{Duration, Instant};

use kvmmem_memory::Range;
use kvmmem_proto::map::PAGE_SIZE as PAGE;
use kvmmem_sys::foreign::Foreign;

use super::reach::Reach;

/// How long a page that was in memory is taken to be there still.
const FRESH: Duration = Duration::from_secs(1);

/// A page's state: not read yet; read once; then the period in which it was last in memory.
const UNREAD: u8 = 0;
const READ_ONCE: u8 = 1;
const FIRST_PERIOD: u8 = 2;

/// The mappings, of one generation of the view.
#[derive(Debug)]
pub(super) struct ReadCache {
    parts: Vec<Part>,
    started: Instant,
}

/// A stretch of guest-physical memory without a gap.
#[derive(Debug)]
struct Part {
    range: Range,
    memory: Foreign,
    /// Of each page, in blocks that are made where they are used.
    states: Box<[OnceLock<Box<States>>]>,
}

/// The states of as many pages as lie in 2 MiB.
type States = [AtomicU8; BLOCK];
const BLOCK: usize = 512;

/// Pieces in a block from which on all of its pages are looked up together: it costs as much as to
/// read a few from the file.
const MANY: usize = 32;

impl ReadCache {
    /// Maps what is reached, as far as it can be mapped.
    pub(super) fn new(reach: &Reach) -> Self {
        let mut ranges: Vec<Range> = Vec::new();
        for range in reach.ranges() {
            match ranges.last_mut().filter(|last| last.end() == range.gpa) {
                Some(last) => last.len += range.len,
                None => ranges.push(range),
            }
        }
        let part = |range: Range| {
            let (page, like) = reach.fit(range).ok()?;
            let memory = Foreign::reserve(range.len, like, false, page).ok()?;
            reach.place(range.gpa, &memory).ok()?;
            let pages = usize::try_from(range.len / PAGE).ok()?;
            let states = (0..pages.div_ceil(BLOCK)).map(|_| OnceLock::new()).collect();
            Some(Part { range, memory, states })
        };
        Self { parts: ranges.into_iter().filter_map(part).collect(), started: Instant::now() }
    }

    /// The period that a page's state is compared with: another one each second, and the same again
    /// after minutes.
    pub(super) fn period(&self) -> u8 {
        let periods = self.started.elapsed().as_millis() / FRESH.as_millis();
        let periods = periods % u128::from(u8::MAX - FIRST_PERIOD);
        FIRST_PERIOD + u8::try_from(periods).unwrap_or(0)
    }

    /// Looks up the blocks in which many of the pieces lie in a row.
    pub(super) fn look_up(&self, period: u8, pieces: &[(u64, &mut [u8])]) {
        let block = |gpa: u64| gpa / (PAGE * BLOCK as u64);
        for run in pieces.chunk_by(|(gpa, _), (next, _)| block(*gpa) == block(*next)) {
            let first = run.first().filter(|_| run.len() >= MANY);
            if let Some((part, offset)) = first.and_then(|(gpa, _)| self.part(*gpa)) {
                part.look_up(period, offset / PAGE);
            }
        }
    }

    /// Copies memory out; whether it did. If not, it is to be read from the file.
    pub(super) fn read(&self, period: u8, gpa: u64, buf: &mut [u8]) -> bool {
        let Some((part, offset)) = self.part(gpa) else { return false };
        part.is_resident(period, offset, buf.len()) && part.memory.read(offset, buf).is_ok()
    }

    /// Begins to load what will be read soon.
    pub(super) fn prefetch(&self, gpa: u64) {
        if let Some((part, offset)) = self.part(gpa) {
            part.memory.prefetch(offset);
        }
    }

    fn part(&self, gpa: u64) -> Option<(&Part, u64)> {
        let offset =
            |part: &Part| gpa.checked_sub(part.range.gpa).filter(|offset| *offset < part.range.len);
        self.parts.iter().find_map(|part| Some((part, offset(part)?)))
    }
}

impl Part {
    /// Whether all of these bytes are in memory, as far as is known.
    fn is_resident(&self, period: u8, offset: u64, len: usize) -> bool {
        let Some(last) = offset.checked_add((len as u64).saturating_sub(1)) else { return false };
        // Two threads may look at the same page: both find out the same.
        let mut all = true;
        for page in offset / PAGE..=last / PAGE {
            let Some(state) = self.state(page) else { return false };
            match state.load(Ordering::Relaxed) {
                known if known == period => {}
                UNREAD => {
                    state.store(READ_ONCE, Ordering::Relaxed);
                    all = false;
                }
                _ => {
                    let mut resident = [0];
                    let is_resident =
                        self.memory.resident(page * PAGE, &mut resident).is_ok() && resident == [1];
                    state.store(if is_resident { period } else { READ_ONCE }, Ordering::Relaxed);
                    all &= is_resident;
                }
            }
        }
        all
    }

    /// Looks up all pages of the block in which `page` is, and maps them at once where all are in
    /// memory.
    fn look_up(&self, period: u8, page: u64) {
        if self.state(page).is_none_or(|state| state.load(Ordering::Relaxed) == period) {
            return;
        }
        let first = page - page % BLOCK as u64;
        let count = usize::try_from(self.range.len / PAGE - first).unwrap_or(BLOCK).min(BLOCK);
        let mut resident = [0; BLOCK];
        let resident = resident.get_mut(..count).unwrap_or_default();
        if self.memory.resident(first * PAGE, resident).is_err() {
            return;
        }
        for (page, _) in (first..).zip(&*resident).filter(|(_, resident)| **resident == 1) {
            if let Some(state) = self.state(page) {
                state.store(period, Ordering::Relaxed);
            }
        }
        if resident.iter().all(|resident| *resident == 1) {
            // Where it fails, each access maps a few pages.
            let _ = self.memory.populate(first * PAGE, count as u64 * PAGE);
        }
    }

    fn state(&self, page: u64) -> Option<&AtomicU8> {
        let page = usize::try_from(page).ok()?;
        let states = self.states.get(page / BLOCK)?;
        let states = states.get_or_init(|| Box::new([const { AtomicU8::new(UNREAD) }; BLOCK]));
        states.get(page % BLOCK)
    }
}
