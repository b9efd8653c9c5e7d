// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds VMCOREINFO notes in guest-physical memory.
//!
//! Each note is checked as it is found, and only those that fit are kept: any number of decoys hides none of them. A page
//! holds at most one note of 4 KiB, so that all checks together read at most as much as the guest has memory, and a walk
//! of page tables for each page.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, available_parallelism};

use kvmmem_memory::{Memory, MemoryError, PAGE_SIZE, Range, VectoredError};

use crate::vmcoreinfo::{HEADER, Note, NoteError, is_header};

/// Pages whose first bytes are read in one call.
const PAGES: usize = 1024;

/// The most notes that fit and are kept: one for each kernel since RAM was last cleared, and those that a guest forges.
pub const MAX_FITTING: usize = 64;

/// The most notes that do not fit and are logged.
const MAX_LOGGED: usize = 16;

/// The most threads that search: from there on memory is no faster.
const MAX_THREADS: usize = 4;

/// Notes that were found.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    /// Those whose page tables lead to the kernel's name ([`Note::check`]), each text once, by ascending address.
    pub fitting: Vec<Note>,
    /// How many there are in all.
    pub count: usize,
    /// Whether more than [`MAX_FITTING`] fit, so that some are not here.
    pub is_cut: bool,
}

impl Notes {
    /// Searches the parts of memory that hold data, with several threads: a note begins at a page, so that the first bytes of
    /// each page are enough. `proceed` is asked after every 4 MiB; the search ends where it says no, or once more notes fit
    /// than are kept.
    ///
    /// # Errors
    /// [`MemoryError::Ended`]. Memory that cannot be read is passed over.
    pub fn find(memory: &dyn Memory, proceed: impl FnMut(&Self) -> bool + Send) -> Result<Self, MemoryError> {
        let parts = memory.data().flat_map(|data| match data {
            Ok(data) => parts(data).map(Ok).collect(),
            Err(error) => vec![Err(error)],
        });
        // Locked by one thread at a time, and never both.
        let (parts, search) = (Mutex::new(parts), Mutex::new((Self::default(), proceed, None)));
        let work = || {
            let mut headers = vec![[0; HEADER]; PAGES];
            while let Some(part) = lock(&parts).next() {
                let found = part.and_then(|part| {
                    let pages = (part.gpa..part.end()).step_by(PAGE_SIZE);
                    read_headers(memory, pages.clone(), &mut headers)?;
                    let found = pages.zip(&headers).filter(|(_, header)| is_header(&header[..]));
                    Ok(found.filter_map(|(gpa, _)| check(memory, gpa)).collect::<Vec<_>>())
                });
                let (notes, proceed, end) = &mut *lock(&search);
                match found {
                    Ok(found) => found.into_iter().for_each(|note| notes.add(note)),
                    Err(error) => *end = Some(Err(error)),
                }
                if end.is_none() && (notes.is_cut || !proceed(notes)) {
                    *end = Some(Ok(()));
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
        let (mut notes, _, end) = search.into_inner().unwrap_or_else(PoisonError::into_inner);
        end.unwrap_or(Ok(()))?;
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
                tracing::info!(gpa = format_args!("{gpa:#x}"), error, "a VMCOREINFO note does not fit");
            }
            Err(_) => {}
        }
    }
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

/// Reads the first bytes of these pages; of pages that cannot be read they are zeros.
fn read_headers(
    memory: &dyn Memory,
    pages: impl Iterator<Item = u64>,
    headers: &mut [[u8; HEADER]],
) -> Result<(), MemoryError> {
    let mut pieces: Vec<(u64, &mut [u8])> =
        pages.zip(headers).map(|(gpa, header)| (gpa, &mut header[..])).collect();
    let mut rest = &mut pieces[..];
    while let Err(VectoredError { piece, source }) = memory.read_vectored(rest) {
        if !source.is_local() {
            return Err(source);
        }
        // From the page after that one on.
        rest = rest.get_mut(piece..).unwrap_or_default();
        let Some(((_, header), later)) = rest.split_first_mut() else { break };
        header.fill(0);
        rest = later;
    }
    Ok(())
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
