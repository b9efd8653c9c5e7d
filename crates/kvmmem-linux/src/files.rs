// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Open files, as /proc/PID/fd shows them.

use crate::budget::{Budget, LISTING};
use crate::bytes::Bytes;
use crate::kernel::{Kernel, KernelError};
use crate::paths::{FilePath, Paths};
use crate::tasks::Task;

/// The most descriptors of a process (`sysctl_nr_open_max` is this on 64 bits, less what a process
/// can do).
const MAX_FDS: u32 = 1 << 20;

/// What the files of all tasks together may take: each its size and its path, each table the bits
/// of its descriptors.
const LIMIT: &str = "1 GiB of open files, or the limit that was set";

/// Reads of a file that changes.
const TRIES: u32 = 3;

/// Pointers that are read at once.
const BATCH: usize = 512;

/// The open files of a process.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct OpenFiles {
    /// The files, by ascending descriptor.
    pub files: Vec<OpenFile>,
    /// Whether descriptors cannot be read, so that some files are missing.
    pub is_cut: bool,
}

/// An open file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenFile {
    /// The descriptor.
    pub fd: u32,
    /// Where its `struct file` is.
    pub gva: u64,
    /// What is open; empty where that cannot be read.
    pub path: FilePath,
    /// As open(2) has them (`O_RDWR` and so on); `None` where they cannot be read, as for the
    /// position.
    pub flags: Option<u32>,
    /// Where the next read or write begins.
    pub position: Option<u64>,
    /// Whether it changed during every read, so that its values may not belong together.
    pub is_torn: bool,
    /// Whether its path, or another of its values, cannot be read.
    pub is_damaged: bool,
}

/// Where everything is, for the files of all processes.
#[derive(Debug)]
pub struct Files<'a> {
    kernel: &'a Kernel<'a>,
    paths: Paths<'a>,
    files: u64,
    fdt: u64,
    fd: u64,
    max_fds: u64,
    open_fds: u64,
    /// From a task to its count of threads.
    signal: u64,
    nr_threads: u64,
    f_mnt: u64,
    f_dentry: u64,
    f_flags: u64,
    f_pos: u64,
    budget: Budget,
}

impl<'a> Files<'a> {
    /// Looks up where a kernel keeps open files.
    ///
    /// # Errors
    /// [`KernelError`]: its types lack something.
    pub fn new(kernel: &'a Kernel<'a>) -> Result<Self, KernelError> {
        let file = |member| kernel.offset("file", member);
        let fdtable = |member| kernel.offset("fdtable", member);
        Ok(Self {
            kernel,
            paths: Paths::new(kernel)?,
            files: kernel.offset("task_struct", "files")?,
            fdt: kernel.offset("files_struct", "fdt")?,
            fd: fdtable("fd")?,
            max_fds: fdtable("max_fds")?,
            open_fds: fdtable("open_fds")?,
            signal: kernel.offset("task_struct", "signal")?,
            nr_threads: kernel.offset("signal_struct", "nr_threads")?,
            f_mnt: file("f_path.mnt")?,
            f_dentry: file("f_path.dentry")?,
            f_flags: file("f_flags")?,
            f_pos: file("f_pos")?,
            budget: Budget::new(LISTING, LIMIT),
        })
    }

    /// The same with another limit, in bytes, of what the files of all tasks take. Their paths lead
    /// through as many directories and mounts at most.
    #[must_use]
    pub fn with_limit(self, bytes: usize) -> Self {
        let paths = self.paths.with_limit(bytes);
        Self { budget: Budget::new(bytes, LIMIT), paths, ..self }
    }

    /// The files of a task; none of one that has ended, or that is the kernel's. Files that are
    /// closed meanwhile are left out.
    ///
    /// # Errors
    /// [`KernelError`]: the table of descriptors cannot be found; [`KernelError::TooMuch`] where
    /// the files of all tasks so far take more than 1 GiB.
    pub fn of(&self, task: &Task) -> Result<OpenFiles, KernelError> {
        let word = |base: u64, at: u64| self.kernel.read_u64(base.wrapping_add(at));
        let files = word(task.gva, self.files)?;
        if files == 0 {
            return Ok(OpenFiles::default());
        }
        let table = word(files, self.fdt)?;
        let array = word(table, self.fd)?;
        let count = self.kernel.read_u32(table.wrapping_add(self.max_fds))?;
        if count > MAX_FDS {
            return Err(KernelError::TooMuch { what: "1,048,576 file descriptors of a process" });
        }
        // The smallest table has a word of them.
        if count == 0 {
            return Err(malformed(table));
        }
        self.budget.take(count.div_ceil(8) as usize)?;
        let (open, lost) = self.descriptors(task, table, array, count);
        let mut found = OpenFiles::default();
        for (fd, gva) in open {
            self.budget.take(size_of::<OpenFile>())?;
            let file = self.file(fd, gva);
            // A file that was closed meanwhile is left out: its memory may hold something else.
            let is_there = word(array, u64::from(fd) * 8).is_ok_and(|now| now == gva);
            match file {
                Ok(file) if is_there => found.files.push(file),
                Err(error) if !error.is_local() => return Err(error),
                Err(_) if is_there => {
                    let (path, is_damaged) = (FilePath::default(), true);
                    let file = OpenFile {
                        fd,
                        gva,
                        path,
                        flags: None,
                        position: None,
                        is_torn: false,
                        is_damaged,
                    };
                    found.files.push(file);
                }
                _ => {}
            }
        }
        match lost {
            Some(error) if !error.is_local() => Err(error),
            lost => Ok(OpenFiles { is_cut: lost.is_some(), ..found }),
        }
    }

    /// The descriptors of a table and the files that they lead to, and why there are not more.
    fn descriptors(
        &self,
        task: &Task,
        table: u64,
        array: u64,
        count: u32,
    ) -> (Vec<(u32, u64)>, Option<KernelError>) {
        let (mut open, mut lost) = (Vec::new(), None);
        for first in (0..count).step_by(BATCH) {
            let batch = u64::from(count - first).min(BATCH as u64);
            let bytes =
                match Bytes::read(self.kernel, array.wrapping_add(u64::from(first) * 8), batch * 8)
                {
                    Ok(bytes) => bytes,
                    Err(error) => {
                        lost = Some(error);
                        continue;
                    }
                };
            if !bytes.is_whole() {
                lost = Some(malformed(array));
            }
            for (fd, at) in (first..).zip((0..batch).map(|number| number * 8)) {
                if bytes.u64(at) != 0 {
                    open.push((fd, bytes.u64(at)));
                }
            }
        }
        (open, lost.or_else(|| self.unused(task, table, count).err()))
    }
    /// Checks that not more descriptors are in use without a file than threads can be about to open
    /// one.
    fn unused(&self, task: &Task, table: u64, count: u32) -> Result<(), KernelError> {
        let word = |base: u64, at: u64| self.kernel.read_u64(base.wrapping_add(at));
        let threads =
            self.kernel.read_u32(word(task.gva, self.signal)?.wrapping_add(self.nr_threads))?;
        let (bits, array) = (word(table, self.open_fds)?, word(table, self.fd)?);
        let (mut used, mut open) = (0, 0);
        for first in (0..count).step_by(BATCH) {
            let batch = u64::from(count - first).min(BATCH as u64);
            let words = Bytes::read(
                self.kernel,
                bits.wrapping_add(u64::from(first) / 8),
                batch.div_ceil(8),
            )?;
            let files =
                Bytes::read(self.kernel, array.wrapping_add(u64::from(first) * 8), batch * 8)?;
            used += words.as_ref().iter().map(|byte| byte.count_ones()).sum::<u32>();
            open +=
                u32::try_from((0..batch).filter(|at| files.u64(at * 8) != 0).count()).unwrap_or(0);
        }
        // A thread may wait in accept(2) with a descriptor that is to be the connection's.
        if used > open.saturating_add(threads) { Err(malformed(table)) } else { Ok(()) }
    }

    fn file(&self, fd: u32, gva: u64) -> Result<OpenFile, KernelError> {
        let mut file = self.look(fd, gva)?;
        for _ in 0..TRIES {
            let again = self.look(fd, gva)?;
            let is_torn = (&file.path, file.flags) != (&again.path, again.flags);
            file = OpenFile { is_torn, ..again };
            if !is_torn {
                break;
            }
        }
        self.budget.take(file.path.text.len())?;
        Ok(file)
    }

    fn look(&self, fd: u32, gva: u64) -> Result<OpenFile, KernelError> {
        let word = |at: u64| self.kernel.read_u64(gva.wrapping_add(at));
        let path = self.paths.of(word(self.f_mnt)?, word(self.f_dentry)?);
        let flags = self.kernel.read_u32(gva.wrapping_add(self.f_flags)).ok();
        let position = word(self.f_pos).ok();
        let is_damaged = path.is_err() || flags.is_none() || position.is_none();
        let path = path
            .or_else(|error| if error.is_local() { Ok(FilePath::default()) } else { Err(error) })?;
        Ok(OpenFile { fd, gva, path, flags, position, is_torn: false, is_damaged })
    }
}

fn malformed(gva: u64) -> KernelError {
    KernelError::Malformed { what: "the table of open files".to_owned(), gva }
}
