// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The files that a process has open.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use super::{Process, ProcessError, failed};
use crate::file_id::FileId;

/// The most file descriptors that are looked through.
const MAX_FILES: usize = 65_536;

impl Process {
    /// What a file descriptor whose link the check accepts is linked to.
    pub fn find_link(
        &self,
        accepts: impl Fn(&str) -> bool,
    ) -> Result<Option<String>, ProcessError> {
        self.find_file(|directory, name| {
            let link = rustix::fs::readlinkat(directory, name, Vec::new()).ok()?;
            let link = String::from_utf8_lossy(link.as_bytes()).into_owned();
            accepts(&link).then_some(link)
        })
    }

    /// Opens a file that it has open, for reading and writing.
    ///
    /// # Errors
    /// [`ProcessError`]; `Ok(None)` where it does not have that file open.
    pub fn open_file(&self, id: FileId) -> Result<Option<OwnedFd>, ProcessError> {
        self.find_file(|directory, name| {
            let is_it = |stat: &Stat| {
                FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
                    && FileId::of(stat) == id
            };
            rustix::fs::statat(directory, name, AtFlags::empty()).ok().filter(is_it)?;
            // It may be another file by now, even a pipe that would be waited for.
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
            let file = rustix::fs::openat(directory, name, flags, Mode::empty()).ok()?;
            rustix::fs::fstat(&file).ok().filter(is_it)?;
            Some(file)
        })
    }

    fn find_file<T>(
        &self,
        mut find: impl FnMut(BorrowedFd<'_>, &CStr) -> Option<T>,
    ) -> Result<Option<T>, ProcessError> {
        let fail = |source: Errno| failed(self.pid, "the open files", source.into());
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let directory =
            rustix::fs::openat(&self.directory, "fd", flags, Mode::empty()).map_err(fail)?;
        for entry in Dir::read_from(&directory).map_err(fail)?.take(MAX_FILES) {
            if let Some(found) = find(directory.as_fd(), entry.map_err(fail)?.file_name()) {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}
