// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Open files, as /proc/PID/fd shows them.

use std::cell::Cell;

use crate::kernel::{Kernel, KernelError};
use crate::paths::{FilePath, Paths};
use crate::tasks::Task;

/// The most descriptors of a process (`sysctl_nr_open_max` is this on 64 bits, less what a process can do).
const MAX_FDS: u32 = 1 << 20;

/// The most bytes of paths of all files together. Descriptors may share a file, so that a few megabytes of the guest's could
/// name any number of long paths.
const MAX_ALL_PATHS: usize = 64 << 20;

/// Reads of a file that changes.
const TRIES: u32 = 3;

/// Pointers that are read at once.
const BATCH: usize = 512;

/// An open file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenFile {
    /// The descriptor.
    pub fd: u32,
    /// Where its `struct file` is.
    pub gva: u64,
    /// What is open.
    pub path: FilePath,
    /// As open(2) has them (`O_RDWR` and so on).
    pub flags: u32,
    /// Where the next read or write begins.
    pub position: u64,
    /// Whether it changed whenever it was read, so that its values may not belong together.
    pub is_torn: bool,
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
    f_mnt: u64,
    f_dentry: u64,
    f_flags: u64,
    f_pos: u64,
    paths_left: Cell<usize>,
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
            f_mnt: file("f_path.mnt")?,
            f_dentry: file("f_path.dentry")?,
            f_flags: file("f_flags")?,
            f_pos: file("f_pos")?,
            paths_left: Cell::new(MAX_ALL_PATHS),
        })
    }

    /// The files of a task, by ascending descriptor; none of one that has ended, or that is the kernel's.
    ///
    /// # Errors
    /// [`KernelError`], also where the paths of all tasks so far are more than 64 MiB. Files that are closed meanwhile are left
    /// out.
    pub fn of(&self, task: &Task) -> Result<Vec<OpenFile>, KernelError> {
        let word = |base: u64, at: u64| self.kernel.read_u64(base.wrapping_add(at));
        let files = word(task.gva, self.files)?;
        if files == 0 {
            return Ok(Vec::new());
        }
        let table = word(files, self.fdt)?;
        let array = word(table, self.fd)?;
        let count = self.kernel.read_u32(table.wrapping_add(self.max_fds))?;
        if count > MAX_FDS {
            return Err(KernelError::TooMuch { what: "1,048,576 file descriptors of a process" });
        }
        // The smallest table has a word of them.
        if count == 0 {
            return Err(KernelError::Malformed { what: "the table of open files".to_owned(), gva: table });
        }
        let mut open = Vec::new();
        let mut bytes = [0; BATCH * 8];
        for first in (0..count).step_by(BATCH) {
            let batch = usize::try_from(count - first).unwrap_or(BATCH).min(BATCH);
            let part = bytes.get_mut(..batch * 8).unwrap_or_default();
            self.kernel.read(array.wrapping_add(u64::from(first) * 8), part)?;
            for (fd, pointer) in (first..).zip(part.as_chunks::<8>().0) {
                let gva = u64::from_le_bytes(*pointer);
                if gva != 0 {
                    open.push((fd, gva, array));
                }
            }
        }
        let mut found = Vec::with_capacity(open.len());
        for (fd, gva, array) in open {
            let file = self.file(fd, gva);
            // A file that was closed meanwhile is left out: its memory may hold something else.
            let is_there = word(array, u64::from(fd) * 8).is_ok_and(|now| now == gva);
            match file {
                Ok(file) if is_there => found.push(file),
                Err(error) if is_there => return Err(error),
                _ => {}
            }
        }
        Ok(found)
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
        let left = self.paths_left.get().checked_sub(file.path.text.len() + 1);
        self.paths_left.set(left.ok_or(KernelError::TooMuch { what: "64 MiB of open files' paths" })?);
        Ok(file)
    }

    fn look(&self, fd: u32, gva: u64) -> Result<OpenFile, KernelError> {
        let word = |at: u64| self.kernel.read_u64(gva.wrapping_add(at));
        let path = self.paths.of(word(self.f_mnt)?, word(self.f_dentry)?)?;
        let flags = self.kernel.read_u32(gva.wrapping_add(self.f_flags))?;
        Ok(OpenFile { fd, gva, path, flags, position: word(self.f_pos)?, is_torn: false })
    }
}
