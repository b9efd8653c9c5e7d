// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds the VMCOREINFO note of the kernel that runs in the target. Only one that fits what is in memory counts, and only
//! if no other one does: a reset leaves the note of the kernel before, with its page tables.

use anyhow::{Result, ensure};
use kvmmem::PAGE_SIZE;
use kvmmem::view::{View, ViewError};
use kvmmem_linux::vmcoreinfo::{Note, headers};

use crate::interrupt::Interrupt;
use crate::range::GpaRange;
use crate::source::data_within;

/// Bytes that are read at a time.
const CHUNK: usize = 1 << 20;

/// The most notes that are looked at: a guest can have its memory full of them.
const MAX_NOTES: usize = 1024;

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Found {
    /// How many notes there are, right or not.
    count: usize,
    /// Those that fit, each text once.
    fit: Vec<Note>,
}

/// Searches these ranges of the target's memory.
pub(super) fn find(view: &View, ranges: &[GpaRange], interrupt: &Interrupt) -> Result<Found> {
    let (mut found, mut buffer) = (Found::default(), vec![0; CHUNK]);
    for data in ranges.iter().flat_map(|range| data_within(view, range)) {
        let data = data?;
        let mut at = data.start;
        while at < data.end && found.count < MAX_NOTES {
            ensure!(!interrupt.has_come(), "interrupted");
            let len = usize::try_from(data.end - at).unwrap_or(CHUNK).min(CHUNK);
            let chunk = buffer.get_mut(..len).unwrap_or_default();
            read(view, at, chunk)?;
            let offsets: Vec<usize> = headers(chunk).collect();
            for offset in offsets {
                found.add(view, at + offset as u64);
            }
            at += len as u64;
        }
    }
    Ok(found)
}

/// Fills the buffer; pages that cannot be read are zeros.
pub(super) fn read(view: &View, gpa: u64, buffer: &mut [u8]) -> Result<Vec<GpaRange>, ViewError> {
    match view.read_at(gpa, buffer) {
        Ok(()) => return Ok(Vec::new()),
        Err(error) if error.is_unreadable() => {}
        Err(error) => return Err(error),
    }
    let mut unreadable: Vec<GpaRange> = Vec::new();
    for (page, at) in buffer.chunks_mut(PAGE_SIZE).zip((gpa..).step_by(PAGE_SIZE)) {
        match view.read_at(at, page) {
            Ok(()) => {}
            Err(error) if error.is_unreadable() => {
                page.fill(0);
                add(&mut unreadable, at..at + page.len() as u64);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(unreadable)
}

/// Adds a range behind those that there are.
pub(super) fn add(ranges: &mut Vec<GpaRange>, range: GpaRange) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

impl Found {
    fn add(&mut self, view: &View, gpa: u64) {
        let read = |gpa: u64, buf: &mut [u8]| view.read_at(gpa, buf);
        let Some(note) = Note::read(gpa, read) else { return };
        self.count += 1;
        match note.check(read) {
            Ok(()) if self.fit.iter().all(|other| other.text() != note.text()) => self.fit.push(note),
            Ok(()) => {}
            Err(error) => {
                tracing::info!(gpa = format_args!("{gpa:#x}"), error = %anyhow::Error::new(error), "a VMCOREINFO note does not fit");
            }
        }
    }

    /// The note of the kernel that runs; otherwise, where there are notes, why it is not known.
    pub(super) fn choose(mut self) -> Result<Option<Note>, String> {
        let places = |notes: &[Note]| {
            notes.iter().map(|note| format!("{:#x}", note.gpa)).collect::<Vec<_>>().join(", ")
        };
        match (self.fit.len(), self.count) {
            (1, _) => Ok(self.fit.pop()),
            (0, 0) => Ok(None),
            (0, count) => Err(format!(
                "{count} VMCOREINFO notes are in the target's memory, and none fits its page tables; the file has none"
            )),
            _ => Err(format!(
                "several VMCOREINFO notes fit the target's page tables, at gpa {}, as after a reset that kept its RAM; \
                 the file has none, as the right one is not known",
                places(&self.fit)
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_several_notes_none_is_taken() {
        let note = |gpa| Note::of_text(gpa, format!("OSRELEASE={gpa}\n"));
        let found = |count, fit: &[u64]| Found { count, fit: fit.iter().copied().map(note).collect() };
        assert_eq!(found(0, &[]).choose(), Ok(None));
        assert_eq!(found(3, &[0x1000]).choose(), Ok(Some(note(0x1000))));
        assert!(found(2, &[]).choose().unwrap_err().contains("none fits"));
        let error = found(2, &[0x1000, 0x5000]).choose().unwrap_err();
        assert!(error.contains("0x1000, 0x5000"), "{error}");
    }

    #[test]
    fn ranges_that_follow_each_other_are_one() {
        let mut ranges = Vec::new();
        [0..1, 1..2, 4..5].into_iter().for_each(|range| add(&mut ranges, range));
        assert_eq!(ranges, [0..2, 4..5]);
    }
}
