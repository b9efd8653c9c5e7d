// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory that cannot be read while the rest can: a page that the VMM lacks or the hardware has
//! lost, a bad sector under a dump. Verbs that go through all memory pass over it, name it, and end
//! with [`UNREADABLE`].

use std::error::Error;
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvmmem::PAGE_SIZE;
use kvmmem_memory::{Memory, MemoryError};

use crate::number::count;
use crate::range::{GpaRange, missing, shown, total};

/// Exit code where some memory could not be read.
pub(crate) const UNREADABLE: u8 = 3;

/// Fills the buffer by `read`. Pages that cannot be read become zeros, where `is_local` accepts the
/// error. Returns them with the first one's error.
pub(crate) fn read<E>(
    gpa: u64,
    buffer: &mut [u8],
    read: impl Fn(u64, &mut [u8]) -> Result<(), E>,
    is_local: impl Fn(&E) -> bool,
) -> Result<(Vec<GpaRange>, Option<E>), E> {
    match read(gpa, buffer) {
        Ok(()) => return Ok((Vec::new(), None)),
        Err(error) if is_local(&error) => {}
        Err(error) => return Err(error),
    }
    let (mut ranges, mut first) = (Vec::new(), None);
    let (mut at, mut rest) = (gpa, buffer);
    while !rest.is_empty() {
        let page = PAGE_SIZE - usize::try_from(at).unwrap_or(0) % PAGE_SIZE;
        let (page, more) = rest.split_at_mut(page.min(rest.len()));
        let end = at + page.len() as u64;
        match read(at, page) {
            Ok(()) => {}
            Err(error) if is_local(&error) => {
                page.fill(0);
                add(&mut ranges, at..end);
                first.get_or_insert(error);
            }
            Err(error) => return Err(error),
        }
        (at, rest) = (end, more);
    }
    Ok((ranges, first))
}

/// Adds a range after the others.
pub(crate) fn add(ranges: &mut Vec<GpaRange>, range: GpaRange) {
    match ranges.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => ranges.push(range),
    }
}

/// What could not be read in a search by many threads.
#[derive(Default)]
pub(crate) struct Unreadable(Mutex<Ranges>);

#[derive(Default)]
struct Ranges {
    /// Ascending, each apart from the next.
    ranges: Vec<GpaRange>,
    /// Why the first one that was met could not be read.
    reason: Option<String>,
}

impl Unreadable {
    /// Fills the buffer from `gpa` on, with zeros for what cannot be read.
    pub(crate) fn read(
        &self,
        memory: &dyn Memory,
        gpa: u64,
        buffer: &mut [u8],
    ) -> Result<(), MemoryError> {
        let (ranges, error) =
            read(gpa, buffer, |gpa, buffer| memory.read_at(gpa, buffer), MemoryError::is_local)?;
        if let Some(error) = error {
            self.found().add(ranges, &error);
        }
        Ok(())
    }

    /// Whether nothing of a range could be read.
    pub(crate) fn covers(&self, range: &GpaRange) -> bool {
        let found = self.found();
        !found.ranges.is_empty() && missing(std::slice::from_ref(range), &found.ranges).is_empty()
    }

    /// Names what could not be read; `code` is the exit code where there is nothing of the kind.
    pub(crate) fn report(&self, code: ExitCode) -> ExitCode {
        let found = self.found();
        let Some(reason) = &found.reason else { return code };
        let (bytes, ranges) = (total(&found.ranges), shown(&found.ranges));
        tracing::warn!(
            "{} could not be read and were passed over, at {ranges}: {reason}",
            count(bytes, "byte")
        );
        ExitCode::from(UNREADABLE)
    }

    fn found(&self) -> MutexGuard<'_, Ranges> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ranges {
    fn add(&mut self, ranges: Vec<GpaRange>, error: &MemoryError) {
        self.reason.get_or_insert_with(|| {
            let mut reason = error.to_string();
            let mut source = error.source();
            while let Some(error) = source {
                reason += &format!(": {error}");
                source = error.source();
            }
            reason
        });
        // Pieces overlap, and threads meet them in any order.
        self.ranges.extend(ranges);
        self.ranges.sort_unstable_by_key(|range| range.start);
        self.ranges.dedup_by(|next, last| {
            let touches = next.start <= last.end;
            if touches {
                last.end = last.end.max(next.end);
            }
            touches
        });
    }
}

#[cfg(test)]
mod tests {
    use kvmmem_memory::Range;

    use super::*;

    /// Memory with pages that cannot be read.
    struct Ram(&'static [u64]);

    impl Memory for Ram {
        fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
            let end = gpa + buf.len() as u64;
            if self.0.iter().any(|page| page * 0x1000 < end && gpa < (page + 1) * 0x1000) {
                return Err(MemoryError::Unreadable { gpa, source: "bad sector".into() });
            }
            buf.fill(7);
            Ok(())
        }

        fn ranges(&self) -> Result<Vec<Range>, MemoryError> {
            Ok(vec![Range { gpa: 0, len: 0x1_0000 }])
        }
    }

    #[test]
    fn pages_that_cannot_be_read_are_zeros_and_named_once() {
        let unreadable = Unreadable::default();
        assert_eq!(unreadable.report(ExitCode::SUCCESS), ExitCode::SUCCESS);
        let ram = Ram(&[3, 4, 9]);
        // Not at the beginnings of pages, and over each other.
        for (gpa, len) in [(0x8800, 0x1000), (0x2ffe, 0x1100), (0x3800, 0x2000)] {
            let mut buffer = vec![1; len];
            unreadable.read(&ram, gpa, &mut buffer).unwrap();
            for (at, byte) in (gpa..).zip(buffer) {
                assert_eq!(byte == 0, [3, 4, 9].contains(&(at / 0x1000)), "{at:#x}");
            }
        }
        assert_eq!(unreadable.found().ranges, [0x3000..0x5000, 0x9000..0x9800]);
        let reason = unreadable.found().reason.clone();
        assert_eq!(reason.as_deref(), Some("cannot read gpa 0x9000: bad sector"));
        assert_eq!(unreadable.report(ExitCode::SUCCESS), ExitCode::from(UNREADABLE));
        assert!(unreadable.covers(&(0x3000..0x5000)) && unreadable.covers(&(0x4010..0x4020)));
        assert!(!unreadable.covers(&(0x2fff..0x3001)) && !unreadable.covers(&(0x4fff..0x5001)));
    }

    #[test]
    fn ranges_that_follow_each_other_are_one() {
        let mut ranges = Vec::new();
        [0..1, 1..2, 4..5].into_iter().for_each(|range| add(&mut ranges, range));
        assert_eq!(ranges, [0..2, 4..5]);
    }
}
