// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Search of guest-physical memory for VMCOREINFO notes, and for patterns at page boundaries.
//!
//! Each note is checked as it is found, and only notes that fit are kept, so that decoys in any
//! number cannot hide one. A page holds at most one note of 4 KiB, so that all checks together read
//! at most as much as the guest has memory, and a walk of page tables for each page.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, available_parallelism};

use kvmmem_memory::{Memory, MemoryError, PAGE_SIZE, Range, VectoredError};

use crate::vmcoreinfo::{HEADER, Note, NoteError, is_header};

/// Pages whose first bytes are read in one call.
const PAGES: usize = 1024;

/// Limit of the notes that fit and are kept: one for each kernel since RAM was last cleared, and
/// the notes that a guest forges.
pub const MAX_FITTING: usize = 64;

/// The most notes that do not fit and are logged.
const MAX_LOGGED: usize = 16;

/// Limit of searching threads: more do not make memory faster.
const MAX_THREADS: usize = 4;

/// Notes that were found.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    /// Those whose page tables lead to the kernel's name ([`Note::check`]), each text once, by
    /// ascending address.
    pub fitting: Vec<Note>,
    /// How many there are in all.
    pub count: usize,
    /// Whether more than [`MAX_FITTING`] fit, so that some are not here.
    pub is_cut: bool,
}

impl Notes {
    /// Searches the parts of memory that hold data, with several threads: a note begins at a page,
    /// so that the first bytes of each page are enough. `proceed` is called after every 4 MiB; the
    /// search ends when it returns false, or once more notes fit than are kept.
    ///
    /// # Errors
    /// [`MemoryError::Ended`]. Memory that cannot be read is passed over.
    pub fn find(
        memory: &dyn Memory,
        mut proceed: impl FnMut(&Self) -> bool + Send,
    ) -> Result<Self, MemoryError> {
        let mut notes = Self::default();
        let pick = |gpa: u64, header: &[u8; HEADER]| {
            if is_header(header) { check(memory, gpa) } else { None }
        };
        pages(memory, 0, pick, |found| {
            found.into_iter().for_each(|note| notes.add(note));
            !notes.is_cut && proceed(&notes)
        })?;
        notes.fitting.sort_by_key(|note| note.gpa);
        Ok(notes)
    }

    fn add(&mut self, note: Result<Note, Unfit>) {
        self.count += 1;
        match note {
            Ok(note) if self.fitting.iter().any(|other| other.text() == note.text()) => {}
            Ok(note) if self.fitting.len() < MAX_FITTING => self.fitting.push(note),
            Ok(_) => self.is_cut = true,
            Err((gpa, error)) if self.count - self.fitting.len() <= MAX_LOGGED => {
                let error: &dyn std::error::Error = &error;
                tracing::info!(
                    gpa = format_args!("{gpa:#x}"),
                    error,
                    "a VMCOREINFO note does not fit"
                );
            }
            Err(_) => {}
        }
    }
}

/// Reads `N` bytes of each page that holds data, from `offset` on, with several threads. `pick`
/// chooses what to keep; after every 4 MiB `take` gets that, and returns whether to continue.
pub(crate) fn pages<const N: usize, T: Send>(
    memory: &dyn Memory,
    offset: u64,
    pick: impl Fn(u64, &[u8; N]) -> Option<T> + Sync,
    take: impl FnMut(Vec<T>) -> bool + Send,
) -> Result<(), MemoryError> {
    let parts = memory.data().flat_map(|data| {
        let (data, error) =
            data.map_or_else(|error| (None, Some(error)), |data| (Some(data), None));
        data.into_iter().flat_map(parts).map(Ok).chain(error.map(Err))
    });
    // Locked by one thread at a time, and never both.
    let (parts, search) = (Mutex::new(parts), Mutex::new((take, None)));
    let work = || {
        let mut bytes = vec![[0; N]; PAGES];
        while let Some(part) = lock(&parts).next() {
            let found = part.and_then(|part| {
                let pages = (part.gpa..part.end()).step_by(PAGE_SIZE);
                read_pages(memory, pages.clone().map(|gpa| gpa + offset), &mut bytes)?;
                Ok(pages.zip(&bytes).filter_map(|(gpa, bytes)| pick(gpa, bytes)).collect())
            });
            let (take, end) = &mut *lock(&search);
            match found {
                Ok(found) => {
                    if end.is_none() && !take(found) {
                        *end = Some(Ok(()));
                    }
                }
                Err(error) => *end = Some(Err(error)),
            }
            if end.is_some() {
                return;
            }
        }
    };
    let threads = available_parallelism().map_or(1, usize::from).min(MAX_THREADS);
    thread::scope(|scope| {
        // Without a thread, the others have more to do.
        (1..threads).for_each(|_| drop(thread::Builder::new().spawn_scoped(scope, work)));
        work();
    });
    let (_, end) = search.into_inner().unwrap_or_else(PoisonError::into_inner);
    end.unwrap_or(Ok(()))
}

/// Where a note is, and why it does not fit.
type Unfit = (u64, NoteError<MemoryError>);

/// The note at `gpa`, if there is one, and if it fits.
fn check(memory: &dyn Memory, gpa: u64) -> Option<Result<Note, Unfit>> {
    let read = |gpa: u64, buf: &mut [u8]| memory.read_at(gpa, buf);
    let note = Note::read(gpa, read)?;
    Some(match note.check(read) {
        Ok(()) => Ok(note),
        Err(error) => Err((gpa, error)),
    })
}

/// The range in parts that begin at a page.
fn parts(range: Range) -> impl Iterator<Item = Range> {
    let start = range.gpa - range.gpa % PAGE_SIZE as u64;
    let (end, step) = (range.end(), PAGES * PAGE_SIZE);
    (start..end).step_by(step).map(move |gpa| Range { gpa, len: (end - gpa).min(step as u64) })
}

/// Reads `N` bytes from each of these addresses on; where they cannot be read they are zeros.
fn read_pages<const N: usize>(
    memory: &dyn Memory,
    places: impl Iterator<Item = u64>,
    bytes: &mut [[u8; N]],
) -> Result<(), MemoryError> {
    let mut pieces: Vec<(u64, &mut [u8])> =
        places.zip(bytes).map(|(gpa, bytes)| (gpa, &mut bytes[..])).collect();
    let mut rest = &mut pieces[..];
    while let Err(VectoredError { piece, source }) = memory.read_vectored(rest) {
        if !source.is_local() {
            return Err(source);
        }
        // From the page after that one on.
        rest = rest.get_mut(piece..).unwrap_or_default();
        let Some(((_, bytes), later)) = rest.split_first_mut() else { break };
        bytes.fill(0);
        rest = later;
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
