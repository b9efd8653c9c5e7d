// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory as the engine asks for it: a piece at a time.

use std::fmt;
use std::sync::{Mutex, PoisonError};

use anyhow::{Error, Result};
use boreal::memory::{FragmentedMemory, MemoryParams, Region, RegionDescription};

use super::reach::end;
use crate::scan::places::Piece;

/// Fills a buffer with a piece, from its first start to its [`end`].
pub(super) type Fill<'a> = &'a (dyn Fn(&Piece, &mut Vec<u8>) -> Result<()> + Sync);

/// How pieces are looked at.
#[derive(Clone, Copy)]
pub(super) struct Access<'a> {
    pub(super) fill: Fill<'a>,
    /// Whether no string matches in a piece, so that it need not be filled in.
    pub(super) passes: &'a (dyn Fn(&Piece) -> bool + Sync),
}

/// Called when strings have been looked for in a piece.
pub(super) type Done<'a> = &'a (dyn Fn(&Piece) + Sync);

/// The memory.
pub(super) struct Pieces<'a> {
    /// What strings are looked for in.
    first: &'a [Piece],
    /// What conditions see.
    again: &'a [Piece],
    access: Access<'a>,
    done: Done<'a>,
    is_again: bool,
    /// Number of the piece that is listed next.
    next: usize,
    failed: Option<&'a Mutex<Option<Error>>>,
    buffer: Vec<u8>,
}

impl<'a> Pieces<'a> {
    /// Memory in which strings are looked for in the pieces of `first`; conditions see it as
    /// `again`.
    pub(super) fn new(
        first: &'a [Piece],
        again: &'a [Piece],
        access: Access<'a>,
        done: Done<'a>,
    ) -> Self {
        Self {
            first,
            again,
            access,
            done,
            is_again: false,
            next: 0,
            failed: None,
            buffer: Vec::new(),
        }
    }

    fn pieces(&self) -> &'a [Piece] {
        if self.is_again { self.again } else { self.first }
    }

    fn failed(&self) -> bool {
        self.failed
            .is_some_and(|failed| failed.lock().unwrap_or_else(PoisonError::into_inner).is_some())
    }
}

/// Scans memory. It cannot report an error to the engine, so an error of reading comes first.
pub(super) fn scan(pieces: Pieces<'_>, scan: impl FnOnce(Pieces<'_>) -> Result<()>) -> Result<()> {
    let failed = Mutex::new(None);
    let result = scan(Pieces { failed: Some(&failed), ..pieces });
    match failed.into_inner().unwrap_or_else(PoisonError::into_inner) {
        Some(error) => Err(error),
        None => result,
    }
}

impl fmt::Debug for Pieces<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pieces")
            .field("first", &self.first.len())
            .field("again", &self.again.len())
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}

impl FragmentedMemory for Pieces<'_> {
    fn next(&mut self, _: &MemoryParams) -> Option<RegionDescription> {
        // What cannot be read once ends the scan.
        if self.failed() {
            return None;
        }
        let piece = loop {
            let piece = self.pieces().get(self.next)?;
            self.next += 1;
            if self.is_again || !(self.access.passes)(piece) {
                break piece;
            }
            (self.done)(piece);
        };
        let start = usize::try_from(piece.starts.start).ok()?;
        Some(RegionDescription {
            start,
            length: usize::try_from(end(piece) - piece.starts.start).ok()?,
        })
    }

    fn fetch(&mut self, _: &MemoryParams) -> Option<Region<'_>> {
        let piece = self.pieces().get(self.next.checked_sub(1)?)?;
        if let Err(error) = (self.access.fill)(piece, &mut self.buffer) {
            if let Some(failed) = self.failed {
                *failed.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
            }
            return None;
        }
        if !self.is_again {
            (self.done)(piece);
        }
        Some(Region { start: usize::try_from(piece.starts.start).ok()?, mem: &self.buffer })
    }

    fn reset(&mut self) {
        self.is_again = true;
        self.next = 0;
    }
}
