// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds VMCOREINFO notes in guest-physical memory.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::{self, available_parallelism};

use kvmmem_memory::{Memory, MemoryError, PAGE_SIZE, Range, VectoredError};

use crate::vmcoreinfo::{HEADER, Note, is_header};

/// Pages whose first bytes are read in one call.
const PAGES: usize = 1024;

/// The most notes that are looked at: a guest can have its memory full of them.
const MAX_NOTES: usize = 1024;

/// The most threads that search: from there on memory is no faster.
const MAX_THREADS: usize = 4;

/// Notes that were found.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    /// Those whose page tables lead to the kernel's name ([`Note::check`]), each text once, by ascending address.
    pub fitting: Vec<Note>,
    /// How many there are in all.
    pub count: usize,
}

impl Notes {
    /// Searches the parts of memory that hold data, with several threads: a note begins at a page, so that the first bytes of
    /// each page are enough. `proceed` is asked after every 4 MiB; the search ends where it says no.
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
                    Ok(pages.zip(&headers).filter(|(_, header)| is_header(&header[..])).map(|(gpa, _)| gpa))
                });
                let (notes, proceed, end) = &mut *lock(&search);
                match found {
                    Ok(found) => found.for_each(|gpa| notes.add(memory, gpa)),
                    Err(error) => *end = Some(Err(error)),
                }
                if end.is_none() && (notes.count >= MAX_NOTES || !proceed(notes)) {
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

    fn add(&mut self, memory: &dyn Memory, gpa: u64) {
        let read = |gpa: u64, buf: &mut [u8]| memory.read_at(gpa, buf);
        let Some(note) = Note::read(gpa, read) else { return };
        self.count += 1;
        if self.count > MAX_NOTES {
            return;
        }
        match note.check(read) {
            Ok(()) if self.fitting.iter().all(|other| other.text() != note.text()) => self.fitting.push(note),
            Ok(()) => {}
            Err(error) => {
                let error: &dyn std::error::Error = &error;
                tracing::info!(gpa = format_args!("{gpa:#x}"), error, "a VMCOREINFO note does not fit");
            }
        }
    }
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
