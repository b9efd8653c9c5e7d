// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads of a dump file at any offset.

use std::fs::{self, File, FileType, Metadata};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt};
use std::path::Path;

use rustix::fs::{Mode, OFlags, SeekFrom, seek};

use super::error::DumpError;

/// Opens a file that can be read at any offset, and says how long it is. Anything else is refused
/// at once: a FIFO would be waited for.
pub(super) fn open(path: &Path) -> Result<(File, u64), DumpError> {
    let fail = |source: io::Error| DumpError::Open { path: path.to_owned(), source };
    let check = |metadata: Metadata| {
        let foreign = |(what, remedy)| DumpError::Foreign { path: path.to_owned(), what, remedy };
        unseekable(metadata.file_type()).map_or(Ok(()), |what| Err(foreign(what)))
    };
    check(fs::metadata(path).map_err(fail)?)?;
    // It may be another one by now.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|error| fail(error.into()))?;
    let file = File::from(file);
    check(file.metadata().map_err(fail)?)?;
    // Of a block device too.
    let len = seek(&file, SeekFrom::End(0)).map_err(|error| fail(error.into()))?;
    seek(&file, SeekFrom::Start(0)).map_err(|error| fail(error.into()))?;
    Ok((file, len))
}

/// What a file is that cannot be read at any offset, and what to do instead.
fn unseekable(kind: FileType) -> Option<(&'static str, &'static str)> {
    if kind.is_fifo() {
        Some(("a pipe", "write what comes through it to a file first"))
    } else if kind.is_dir() {
        Some(("a directory", "name the dump in it"))
    } else if kind.is_socket() {
        Some(("a socket", "name a dump file"))
    } else if kind.is_char_device() {
        Some(("a character device", "name a dump file"))
    } else {
        None
    }
}

/// Fills the buffer as far as the file goes, and says how far that is.
pub(super) fn read_some(file: &File, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while let Some(rest) = buf.get_mut(done..).filter(|rest| !rest.is_empty()) {
        match file.read_at(rest, offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
