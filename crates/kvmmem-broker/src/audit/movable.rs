// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The audit log's file. It may be moved away at any time, as logrotate does: the next line begins
//! a new one.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;

/// The file that is written to.
#[derive(Debug)]
pub(crate) struct AuditFile {
    path: PathBuf,
    file: File,
}

impl AuditFile {
    /// Appends to the file at `path`, made with mode 0600 if it is not there.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { path: path.to_owned(), file: open(path)? })
    }

    /// Whether the file is still what its path names.
    fn is_in_place(&self) -> io::Result<bool> {
        let (named, held) = (std::fs::metadata(&self.path)?, self.file.metadata()?);
        Ok((named.dev(), named.ino()) == (held.dev(), held.ino()))
    }
}

impl Write for AuditFile {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !self.is_in_place().unwrap_or(false)
            && let Ok(file) = open(&self.path)
        {
            // Where no new file can be made, the old one, wherever it is now, is better than none.
            self.file = file;
        }
        self.file.write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn open(path: &Path) -> io::Result<File> {
    // A FIFO that is not read is an error, which a regular file never gives: it would be waited
    // for, and no signal ended that.
    let flags = i32::try_from(OFlags::NONBLOCK.bits()).map_err(io::Error::other)?;
    let mut options = OpenOptions::new();
    let file = options.create(true).append(true).mode(0o600).custom_flags(flags).open(path)?;
    // A reader that is slow is waited for.
    rustix::fs::fcntl_setfl(&file, OFlags::APPEND)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fifo_that_is_not_read_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, 0o600.into()).unwrap();
        let error = AuditFile::open(&path).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(rustix::io::Errno::NXIO.raw_os_error()));
    }

    #[test]
    fn a_file_that_was_moved_away_is_followed_by_a_new_one() {
        let directory = tempfile::tempdir().unwrap();
        let (path, old) =
            (directory.path().join("audit.log"), directory.path().join("audit.log.1"));
        let mut file = AuditFile::open(&path).unwrap();
        file.write_all(b"one\n").unwrap();
        std::fs::rename(&path, &old).unwrap();
        file.write_all(b"two\n").unwrap();
        assert_eq!(std::fs::read(&old).unwrap(), b"one\n");
        assert_eq!(std::fs::read(&path).unwrap(), b"two\n");
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
    }

    #[test]
    fn where_none_can_be_made_the_old_one_goes_on() {
        let directory = tempfile::tempdir().unwrap();
        let folder = directory.path().join("log");
        std::fs::create_dir(&folder).unwrap();
        let mut file = AuditFile::open(&folder.join("audit.log")).unwrap();
        let moved = directory.path().join("moved");
        std::fs::rename(&folder, &moved).unwrap();
        file.write_all(b"one\n").unwrap();
        assert_eq!(std::fs::read(moved.join("audit.log")).unwrap(), b"one\n");
    }
}
