// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds VMCOREINFO notes in guest-physical memory.

use kvmmem_memory::{Memory, MemoryError, PAGE_SIZE, Range};

use crate::vmcoreinfo::{Note, headers};

/// Bytes that are read at a time.
const CHUNK: usize = 1 << 20;

/// The most notes that are looked at: a guest can have its memory full of them.
const MAX_NOTES: usize = 1024;

/// Notes that were found.
#[derive(Clone, Debug, Default)]
pub struct Notes {
    /// Those whose page tables lead to the kernel's name ([`Note::check`]), each text once, by ascending address.
    pub fitting: Vec<Note>,
    /// How many there are in all.
    pub count: usize,
}

impl Notes {
    /// Searches the parts of memory that hold data. `proceed` is asked once for each MiB; the search ends where it says no.
    ///
    /// # Errors
    /// [`MemoryError::Ended`]. Memory that cannot be read is passed over.
    pub fn find(memory: &dyn Memory, mut proceed: impl FnMut(&Self) -> bool) -> Result<Self, MemoryError> {
        let (mut notes, mut buffer) = (Self::default(), vec![0; CHUNK]);
        for data in memory.data() {
            for part in chunks(data?) {
                let len = usize::try_from(part.len).unwrap_or(CHUNK).min(CHUNK);
                let chunk = buffer.get_mut(..len).unwrap_or_default();
                read(memory, part.gpa, chunk)?;
                for offset in headers(chunk) {
                    notes.add(memory, part.gpa + offset as u64);
                }
                if notes.count >= MAX_NOTES || !proceed(&notes) {
                    return Ok(notes);
                }
            }
        }
        Ok(notes)
    }

    fn add(&mut self, memory: &dyn Memory, gpa: u64) {
        let read = |gpa: u64, buf: &mut [u8]| memory.read_at(gpa, buf);
        let Some(note) = Note::read(gpa, read) else { return };
        self.count += 1;
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
fn chunks(range: Range) -> impl Iterator<Item = Range> {
    let start = range.gpa - range.gpa % PAGE_SIZE as u64;
    let end = range.end();
    (start..end).step_by(CHUNK).map(move |gpa| Range { gpa, len: (end - gpa).min(CHUNK as u64) })
}

/// Fills the buffer; pages that cannot be read are zeros.
fn read(memory: &dyn Memory, gpa: u64, buffer: &mut [u8]) -> Result<(), MemoryError> {
    match memory.read_at(gpa, buffer) {
        Err(error) if error.is_local() => {}
        result => return result,
    }
    for (page, at) in buffer.chunks_mut(PAGE_SIZE).zip((gpa..).step_by(PAGE_SIZE)) {
        match memory.read_at(at, page) {
            Err(error) if error.is_local() => page.fill(0),
            result => result?,
        }
    }
    Ok(())
}
