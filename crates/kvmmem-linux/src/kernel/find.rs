// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds the kernel that runs in a guest, among the notes that kernels have left in its memory.
//!
//! A reset that keeps RAM leaves the note of the kernel before, with its page tables, symbols and all that they lead to: such
//! a note fits as well as the right one. Of a running guest the right one is that whose clock ticks. Of a dump, or of a paused
//! guest, nothing in memory tells: a vCPU's CR3 does, or the caller must choose.

use std::thread;
use std::time::{Duration, Instant};

use kvmmem_memory::{Memory, MemoryError};

use super::Kernel;
use crate::search::{MAX_FITTING, Notes};
use crate::vmcoreinfo::Note;

/// How long the clocks of several kernels are watched. A guest that is idle stops its clock for some time, at most 4 s.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long to wait between two looks at the clocks.
const PAUSE: Duration = Duration::from_millis(10);

/// The most ticks that a clock can do while it is watched: 1000 a second, with what a guest catches up. Memory that a new kernel
/// uses for something else changes in other ways.
const MAX_TICKS: u64 = 1_000_000;

/// How to tell the right kernel from those before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Find {
    /// The guest runs: its clock may be watched.
    pub is_live: bool,
    /// The guest-physical address of the right kernel's note, where the caller knows it.
    pub note: Option<u64>,
    /// CR3 of a vCPU, where the caller has its registers: the right kernel is in that address space.
    pub cr3: Option<u64>,
}

/// There is no kernel, or no telling which.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The memory cannot be read.
    #[error("cannot search the guest's memory")]
    Memory(#[source] MemoryError),
    /// There is no note.
    #[error(
        "no Linux kernel was found: there is no VMCOREINFO note in the guest's memory; another system, a kernel without CONFIG_VMCORE_INFO, or one that is still booting"
    )]
    NoNote,
    /// There are notes, of kernels that are no more.
    #[error("no Linux kernel was found: {}", none_of(*count))]
    NoneFits {
        /// How many notes there are.
        count: usize,
    },
    /// More notes fit than a guest can have by itself.
    #[error(
        "more than {MAX_FITTING} VMCOREINFO notes fit the page tables in the guest's memory, forged ones or those of earlier boots, and nothing tells which one is right: choose one by its address"
    )]
    TooMany,
    /// Where the caller says there is no note that fits.
    #[error("there is no VMCOREINFO note at gpa {gpa:#x} that fits the page tables in memory")]
    NotThere {
        /// Where.
        gpa: u64,
    },
    /// Several notes fit.
    #[error(
        "several Linux kernels were found, as after a reset that kept the guest's RAM, and nothing tells which one runs: {}; choose one by its note's address",
        list(candidates)
    )]
    Ambiguous {
        /// Their notes.
        candidates: Vec<Note>,
    },
}

fn none_of(count: usize) -> String {
    match count {
        1 => "the VMCOREINFO note in the guest's memory does not fit its page tables".to_owned(),
        count => {
            format!(
                "{count} VMCOREINFO notes are in the guest's memory, and none of them fits its page tables"
            )
        }
    }
}

fn list(candidates: &[Note]) -> String {
    let line = |note: &Note| {
        let build = note.value("BUILD-ID").and_then(|id| id.get(..12)).unwrap_or("unknown");
        format!("gpa {:#x} (release {}, build {build})", note.gpa, note.release().unwrap_or("unknown"))
    };
    candidates.iter().map(line).collect::<Vec<_>>().join(", ")
}

impl<'m> Kernel<'m> {
    /// Finds the kernel that runs in the guest with this memory.
    ///
    /// A running guest is not searched further once a kernel's clock has ticked.
    ///
    /// # Errors
    /// [`FindError`].
    pub fn find(memory: &'m dyn Memory, find: Find) -> Result<Self, FindError> {
        if let Some(gpa) = find.note {
            let read = |gpa: u64, buf: &mut [u8]| memory.read_at(gpa, buf);
            let note = Note::read(gpa, read).filter(|note| note.check(read).is_ok());
            return note.and_then(|note| Self::of_note(memory, note).ok()).ok_or(FindError::NotThere { gpa });
        }
        let mut clocks: Vec<Clock<'m>> = Vec::new();
        let mut running = None;
        let notes = Notes::find(memory, |notes| {
            if find.is_live {
                watch(&mut clocks, memory, &notes.fitting);
                running = running.or_else(|| clocks.iter().position(Clock::ticks));
            }
            running.is_none()
        });
        let mut notes = notes.map_err(FindError::Memory)?;
        if let Some(cr3) = find.cr3.filter(|_| notes.fitting.len() > 1) {
            let has_cr3 = |note: &Note| {
                Self::of_note(memory, note.clone()).is_ok_and(|kernel| kernel.space.shares_kernel(cr3))
            };
            // A CR3 of no kernel, as of firmware, says nothing.
            if notes.fitting.iter().any(has_cr3) {
                notes.fitting.retain(has_cr3);
            }
        }
        if find.is_live && notes.fitting.len() > 1 {
            watch(&mut clocks, memory, &notes.fitting);
            let start = Instant::now();
            let any = clocks.iter().any(|clock| clock.first.is_some());
            while any && running.is_none() && start.elapsed() < PATIENCE {
                thread::sleep(PAUSE);
                running = clocks.iter().position(Clock::ticks);
            }
        }
        if let Some(running) = running.filter(|running| *running < clocks.len()) {
            return Ok(clocks.swap_remove(running).kernel);
        }
        if notes.is_cut {
            return Err(FindError::TooMany);
        }
        if notes.fitting.len() > 1 {
            // A forged note has no symbols that fit it.
            let has_symbols = |note: &Note| {
                Self::of_note(memory, note.clone()).is_ok_and(|kernel| kernel.symbols().is_ok())
            };
            let real: Vec<Note> = notes.fitting.iter().filter(|note| has_symbols(note)).cloned().collect();
            if !real.is_empty() {
                notes.fitting = real;
            }
        }
        let Notes { mut fitting, count, .. } = notes;
        match (fitting.len(), count, fitting.pop()) {
            (1, _, Some(note)) => match clocks.into_iter().find(|clock| *clock.kernel.note() == note) {
                // Its symbols have been read. What was read of page tables may have changed.
                Some(Clock { kernel, .. }) => {
                    kernel.space.forget();
                    Ok(kernel)
                }
                None => Self::of_note(memory, note).map_err(|_| FindError::NoneFits { count }),
            },
            (0, 0, _) => Err(FindError::NoNote),
            (0, ..) => Err(FindError::NoneFits { count }),
            (_, _, last) => {
                fitting.extend(last);
                Err(FindError::Ambiguous { candidates: fitting })
            }
        }
    }
}

/// A kernel whose clock is watched.
struct Clock<'m> {
    kernel: Kernel<'m>,
    /// Where `jiffies_64` is, and what it was; `None` where that cannot be read.
    first: Option<(u64, u64)>,
}

impl Clock<'_> {
    /// Whether it has ticked since it was first seen.
    fn ticks(&self) -> bool {
        self.first.is_some_and(|(gva, first)| {
            let now = self.kernel.read_u64(gva).unwrap_or(first);
            (1..MAX_TICKS).contains(&now.wrapping_sub(first))
        })
    }
}

/// Adds the clocks of the kernels that were not watched yet.
fn watch<'m>(clocks: &mut Vec<Clock<'m>>, memory: &'m dyn Memory, notes: &[Note]) {
    for note in notes {
        if clocks.iter().any(|clock| clock.kernel.note().gpa == note.gpa) {
            continue;
        }
        if let Ok(kernel) = Kernel::of_note(memory, note.clone()) {
            let gva = kernel.symbol("jiffies_64").ok();
            let first = gva.and_then(|gva| Some((gva, kernel.read_u64(gva).ok()?)));
            clocks.push(Clock { kernel, first });
        }
    }
}
