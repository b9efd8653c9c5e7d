// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds the kernel that runs in a guest. Memory may hold traces of several kernels: a VMCOREINFO
//! note, or, where there is no whole note, page tables and symbols.
//!
//! A reset that keeps RAM leaves the previous kernel in memory, with its note, page tables, symbols
//! and everything that they lead to: it fits as well as the current one. In a running guest, the
//! clock of the current kernel ticks. In a dump or a paused guest, memory alone does not decide: a
//! vCPU's CR3 or LSTAR does, or the caller must choose.

use std::thread;
use std::time::{Duration, Instant};

use kvmmem_memory::{Memory, MemoryError};

use super::guest_kernel::Kernel;
use super::image::{Images, MAX_IMAGES};
use crate::search::{MAX_FITTING, Notes};
use crate::vmcoreinfo::Note;

/// Where system calls enter the kernel: LSTAR of each vCPU.
const SYSTEM_CALLS: &str = "entry_SYSCALL_64";

/// How long the clocks of several kernels are watched. A guest that is idle stops its clock for
/// some time, at most 4 s.
const PATIENCE: Duration = Duration::from_secs(5);

/// How long to wait between two looks at the clocks.
const PAUSE: Duration = Duration::from_millis(10);

/// The most ticks that a clock can do while it is watched: 1000 a second, with what a guest catches
/// up. Memory that a new kernel uses for something else changes in other ways.
const MAX_TICKS: u64 = 1_000_000;

/// How to recognise the current kernel among previous ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Find {
    /// The guest runs: its clock may be watched.
    pub is_live: bool,
    /// The guest-physical address of the right kernel's note, where the caller knows it.
    pub note: Option<u64>,
    /// CR3 of a vCPU, where the caller has its registers: the current kernel is in that address
    /// space. The CR3 of firmware is ignored.
    pub cr3: Option<u64>,
    /// LSTAR of a vCPU: the right kernel's system calls begin there.
    pub lstar: Option<u64>,
    /// CR3 of the right kernel, or of one of its processes, where the caller knows it.
    pub kernel: Option<u64>,
}

/// There is no kernel, or it cannot be chosen.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The memory cannot be read.
    #[error("cannot search the guest's memory")]
    Memory(#[source] MemoryError),
    /// There is nothing of a kernel.
    #[error(
        "no Linux kernel was found: neither a VMCOREINFO note nor page tables that lead to a kernel's symbols; another system, a kernel without CONFIG_KALLSYMS_ALL, or one that is still booting"
    )]
    NoKernel,
    /// There are notes, but their kernels are gone from memory.
    #[error("no Linux kernel was found: {}, nor do page tables lead to a kernel's symbols", none_of(*count))]
    NoneFits {
        /// How many notes there are.
        count: usize,
    },
    /// More notes fit than a guest can have by itself.
    #[error(
        "more than {MAX_FITTING} VMCOREINFO notes or {MAX_IMAGES} kernel images fit the page tables in the guest's memory, forged ones or those of earlier boots, and nothing tells which one is right: choose one by its address"
    )]
    TooMany,
    /// There is no note that fits at the caller's address.
    #[error("there is no VMCOREINFO note at gpa {gpa:#x} that fits the page tables in memory")]
    NotThere {
        /// Where.
        gpa: u64,
    },
    /// There is no kernel in the caller's address space.
    #[error("no Linux kernel was found in the address space of CR3 {cr3:#x}")]
    NotInSpace {
        /// Which.
        cr3: u64,
    },
    /// Several kernels fit.
    #[error(
        "several Linux kernels were found, as after a reset that kept the guest's RAM, and nothing tells which one runs: {}",
        list(candidates)
    )]
    Ambiguous {
        /// Which.
        candidates: Vec<Candidate>,
    },
}

/// A kernel that may be the one that runs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Candidate {
    /// Its note, or the one made for it.
    pub note: Note,
    /// Its own CR3.
    pub cr3: u64,
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

fn list(candidates: &[Candidate]) -> String {
    let line = |Candidate { note, cr3 }: &Candidate| {
        let build = note.value("BUILD-ID").and_then(|id| id.get(..12)).unwrap_or("unknown");
        let place = match note.gpa {
            Some(gpa) => format!("note at gpa {gpa:#x}"),
            None => format!("CR3 {cr3:#x}"),
        };
        format!("{place} (release {}, build {build})", note.release().unwrap_or("unknown"))
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
            return note
                .and_then(|note| Self::of_note(memory, note).ok())
                .ok_or(FindError::NotThere { gpa });
        }
        if let Some(cr3) = find.kernel {
            return Self::of_cr3(memory, cr3).ok_or(FindError::NotInSpace { cr3 });
        }
        let mut clocks = Clocks::default();
        let mut running = None;
        let notes = Notes::find(memory, |notes| {
            if find.is_live && notes.fitting.len() > clocks.0.len() {
                clocks.watch(
                    notes
                        .fitting
                        .iter()
                        .filter_map(|note| Self::of_note(memory, note.clone()).ok()),
                );
            }
            running = running.or_else(|| clocks.running());
            running.is_none()
        });
        let Notes { fitting, count, mut is_cut } = notes.map_err(FindError::Memory)?;
        if let Some(running) = running {
            return Ok(clocks.take(running));
        }
        let kernel = |note: Note| clocks.remove(&note).or_else(|| Self::of_note(memory, note).ok());
        let mut kernels: Vec<Self> = fitting.into_iter().filter_map(kernel).collect();
        if let Some(cr3) =
            find.cr3.filter(|cr3| !kernels.iter().any(|kernel| kernel.space.shares_kernel(*cr3)))
            && let Some(kernel) = Self::of_cr3(memory, cr3)
        {
            return Ok(kernel);
        }
        if kernels.is_empty() {
            let images = Images::find(memory).map_err(FindError::Memory)?;
            is_cut = images.is_cut;
            kernels = images.kernels(memory);
        }
        retain(&mut kernels, |kernel| find.cr3.is_some_and(|cr3| kernel.space.shares_kernel(cr3)));
        retain(&mut kernels, |kernel| find.lstar.is_some_and(|lstar| kernel.enters_at(lstar)));
        if find.is_live && kernels.len() > 1 {
            let mut clocks = Clocks::default();
            clocks.watch(kernels.into_iter());
            if let Some(running) = clocks.wait() {
                return Ok(clocks.take(running));
            }
            kernels = clocks.kernels();
        }
        if is_cut {
            return Err(FindError::TooMany);
        }
        if kernels.len() > 1 {
            // A forged note has no symbols that fit it.
            retain(&mut kernels, |kernel| kernel.symbols().is_ok());
        }
        if kernels.len() > 1 {
            let candidate = |kernel: &Self| Candidate {
                note: kernel.note.clone(),
                cr3: kernel.space.root().cr3,
            };
            return Err(FindError::Ambiguous {
                candidates: kernels.iter().map(candidate).collect(),
            });
        }
        let none = if count == 0 { FindError::NoKernel } else { FindError::NoneFits { count } };
        kernels.pop().ok_or(none)
    }

    /// Whether system calls enter the kernel there.
    fn enters_at(&self, lstar: u64) -> bool {
        self.symbols().is_ok_and(|symbols| symbols.all(SYSTEM_CALLS).any(|gva| gva == lstar))
    }
}

/// Keeps the kernels that pass a test, if there are several and any passes.
fn retain<'m>(kernels: &mut Vec<Kernel<'m>>, is_right: impl Fn(&Kernel<'m>) -> bool) {
    if kernels.len() > 1 && kernels.iter().any(&is_right) {
        kernels.retain(is_right);
    }
}

/// The clocks of kernels that were found.
#[derive(Default)]
struct Clocks<'m>(Vec<Clock<'m>>);

impl<'m> Clocks<'m> {
    /// Adds the clocks of the kernels that are not watched yet.
    fn watch(&mut self, kernels: impl Iterator<Item = Kernel<'m>>) {
        for kernel in kernels {
            if self.0.iter().all(|clock| clock.kernel.note != kernel.note) {
                self.0.push(Clock::new(kernel));
            }
        }
    }

    /// The number of a kernel whose clock has ticked.
    fn running(&self) -> Option<usize> {
        self.0.iter().position(Clock::ticks)
    }

    /// The same; waits for it.
    fn wait(&self) -> Option<usize> {
        let start = Instant::now();
        while self.0.iter().any(|clock| clock.first.is_some()) && start.elapsed() < PATIENCE {
            thread::sleep(PAUSE);
            if let Some(running) = self.running() {
                return Some(running);
            }
        }
        None
    }

    /// The kernel of a note, whose symbols have been read. What was read of its page tables may
    /// have changed.
    fn remove(&mut self, note: &Note) -> Option<Kernel<'m>> {
        let number = self.0.iter().position(|clock| clock.kernel.note == *note)?;
        let kernel = self.0.swap_remove(number).kernel;
        kernel.space.forget();
        Some(kernel)
    }

    fn take(mut self, number: usize) -> Kernel<'m> {
        self.0.swap_remove(number).kernel
    }

    fn kernels(self) -> Vec<Kernel<'m>> {
        self.0.into_iter().map(|clock| clock.kernel).collect()
    }
}

/// A kernel whose clock is watched.
struct Clock<'m> {
    kernel: Kernel<'m>,
    /// Where `jiffies_64` is, and what it was; `None` where that cannot be read.
    first: Option<(u64, u64)>,
}

impl<'m> Clock<'m> {
    fn new(kernel: Kernel<'m>) -> Self {
        let gva = kernel.symbol("jiffies_64").ok();
        let first = gva.and_then(|gva| Some((gva, kernel.read_u64(gva).ok()?)));
        Self { kernel, first }
    }

    /// Whether it has ticked since it was first seen.
    fn ticks(&self) -> bool {
        self.first.is_some_and(|(gva, first)| {
            let now = self.kernel.read_u64(gva).unwrap_or(first);
            (1..MAX_TICKS).contains(&now.wrapping_sub(first))
        })
    }
}
