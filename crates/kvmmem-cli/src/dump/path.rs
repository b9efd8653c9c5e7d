// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Paths that a dump is written to: a file, which is made, or a stream (a pipe, a FIFO, a device).

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, IsTerminal};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{FlockOperation, flock};

/// What a path is good for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A file, which may be there.
    File,
    Stream,
}

/// Whether a path names this process's standard output.
fn is_stdout(path: &Path) -> bool {
    ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].iter().any(|name| path == Path::new(name))
}

/// What `path` is, or why nothing can be dumped there.
pub(super) fn kind(path: &Path) -> Result<Kind> {
    if is_stdout(path) {
        return Ok(Kind::Stream);
    }
    let shown = path.display();
    let kind = match fs::metadata(path) {
        Ok(metadata) => metadata.file_type(),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Kind::File),
        Err(error) => return Err(error).with_context(|| format!("cannot write {shown}")),
    };
    let what = if kind.is_file() {
        return Ok(Kind::File);
    } else if kind.is_fifo() || kind.is_char_device() {
        return Ok(Kind::Stream);
    } else if kind.is_dir() {
        "a folder"
    } else if kind.is_block_device() {
        "a block device"
    } else {
        "a socket"
    };
    bail!("{shown} is {what}: name a file in a folder, a FIFO, or - for standard output")
}

/// Opens a stream; a FIFO once it has a reader.
pub(super) fn open_stream(path: &Path) -> Result<File> {
    let shown = path.display();
    let open = || match is_stdout(path) {
        true => io::stdout().as_fd().try_clone_to_owned().map(File::from),
        false => OpenOptions::new().write(true).open(path),
    };
    let file = open().with_context(|| format!("cannot write {shown}"))?;
    let remedy =
        "name a file, or pass standard output on, as in: kvmmem dump - --compress zstd > FILE";
    ensure!(
        !file.is_terminal(),
        "{shown} is a terminal, and a dump is not to be read there: {remedy}"
    );
    Ok(file)
}

/// Opens a file to continue.
pub(super) fn open_file(path: &Path) -> Result<File> {
    let open = || lock(OpenOptions::new().read(true).write(true).open(path)?);
    open().with_context(|| format!("cannot write {}", path.display()))
}

fn lock(file: File) -> io::Result<File> {
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

/// A new file, which is removed unless it is kept: a dump that fails leaves none that would be in
/// the way of the next one.
#[derive(Debug)]
pub(super) struct NewFile<'a>(Option<&'a Path>);

impl<'a> NewFile<'a> {
    /// Nothing that is to be removed.
    pub(super) fn none() -> Self {
        Self(None)
    }

    /// Makes a file.
    pub(super) fn create(&mut self, path: &'a Path) -> Result<File> {
        let mut create = || {
            let mut options = OpenOptions::new();
            let file = options.read(true).write(true).create_new(true).mode(0o600).open(path)?;
            self.0 = Some(path);
            lock(file)
        };
        create().with_context(|| format!("cannot write {}", path.display()))
    }

    /// It stays.
    pub(super) fn keep(&mut self) {
        self.0 = None;
    }
}

impl Drop for NewFile<'_> {
    fn drop(&mut self) {
        if let Some(path) = self.0 {
            // The error that was met first is the one to report.
            let _ = fs::remove_file(path);
        }
    }
}

/// Checks that a file can be made at a path.
pub(super) fn check_new(path: &Path) -> Result<()> {
    let shown = path.display();
    let exists = path.symlink_metadata().map(|_| true).or_else(|error| match error.kind() {
        ErrorKind::NotFound => Ok(false),
        _ => Err(error),
    });
    ensure!(
        !exists.with_context(|| format!("cannot write {shown}"))?,
        "{shown} exists: remove it, or choose another name"
    );
    let folder = match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
        _ => PathBuf::from("."),
    };
    rustix::fs::access(&folder, rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK)
        .with_context(|| format!("cannot write {shown}: its folder takes no files"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        for (path, is) in
            [("-", Kind::Stream), ("/dev/full", Kind::Stream), ("/dev/stdout", Kind::Stream)]
        {
            assert_eq!(kind(Path::new(path)).unwrap(), is, "{path}");
        }
        assert_eq!(kind(&directory.path().join("new")).unwrap(), Kind::File);
        let error = kind(directory.path()).unwrap_err().to_string();
        assert!(error.contains("is a folder"), "{error}");
        check_new(&directory.path().join("new")).unwrap();
        for is_kept in [false, true] {
            let path = directory.path().join("new");
            let mut new = NewFile::none();
            new.create(&path).unwrap();
            if is_kept {
                new.keep();
            }
            drop(new);
            assert_eq!(path.exists(), is_kept);
            // One that was there is not removed.
            assert_eq!(NewFile::none().create(&path).is_ok(), !is_kept);
            assert_eq!(path.exists(), is_kept);
        }
        let error = check_new(&directory.path().join("none/new")).unwrap_err();
        assert!(format!("{error:#}").contains("No such file"), "{error:#}");
    }
}
