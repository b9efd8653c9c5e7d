// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a dump goes: a new file, which keeps its holes, or a stream (a pipe, a FIFO, a device),
//! which gets every byte in order. It is opened before a token is used, so that a mistake in the
//! path costs none.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use kvmmem::PAGE_SIZE;
use rustix::fs::{FlockOperation, flock};
use serde::Serialize;
use zstd::stream::write::Encoder;

use super::pipe::Pipe;
use crate::failure::ClosedPipe;
use crate::interrupt::Interrupt;

/// Zeros that are written to a stream at a time.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// How long a pipe may be full while the target is paused.
const STALL: Duration = Duration::from_secs(30);

/// The most threads that compress.
const MAX_THREADS: u32 = 4;

/// What a path is good for.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// A file, which may be there.
    File,
    Stream,
}

/// Where the bytes go.
pub(super) enum Sink {
    File(File),
    /// A stream, or a file that is written as one.
    Stream {
        to: Stream,
        /// How many bytes have gone.
        at: u64,
    },
}

/// How the bytes of a stream are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Compression {
    /// One frame of Zstandard, with a checksum; `zstd -d` unpacks it
    Zstd,
}

/// What a stream is written to.
pub(super) enum Stream {
    Plain(Pipe),
    Zstd(Encoder<'static, Pipe>),
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(pipe) => pipe.write(bytes),
            Self::Zstd(encoder) => encoder.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(pipe) => pipe.flush(),
            Self::Zstd(encoder) => encoder.flush(),
        }
    }
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

/// Opens a new file, or one to continue.
pub(super) fn open_file(path: &Path, is_there: bool) -> Result<File> {
    let open = || {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(!is_there).mode(0o600);
        let file = options.open(path)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)?;
        Ok::<_, io::Error>(file)
    };
    open().with_context(|| format!("cannot write {}", path.display()))
}

impl Sink {
    /// What writes to a file of a kind until a signal comes; what is compressed is written as a
    /// stream.
    pub(super) fn new(
        (file, kind): (File, Kind),
        by: Option<Compression>,
        interrupt: &Interrupt,
        is_paused: bool,
    ) -> Result<Self> {
        if kind == Kind::File && by.is_none() {
            return Ok(Self::File(file));
        }
        let pipe = Pipe::new(file, interrupt, is_paused.then_some(STALL))
            .context("cannot write the dump")?;
        let to = match by {
            None => Stream::Plain(pipe),
            Some(Compression::Zstd) => {
                Stream::Zstd(encoder(pipe).context("cannot start to compress")?)
            }
        };
        Ok(Self::Stream { to, at: 0 })
    }

    /// Shortens a file to `keep` bytes, or makes it so long; what a stream has cannot be undone.
    pub(super) fn set_len(&self, keep: u64) -> io::Result<()> {
        match self {
            Self::File(file) => file.set_len(keep),
            Self::Stream { .. } => Ok(()),
        }
    }

    /// Writes bytes at `offset`. In a stream `offset` is at or after the position; zeros fill the
    /// gap.
    pub(super) fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        match self {
            Self::File(file) => {
                let mut offset = offset;
                for (is_zero, bytes) in runs(bytes) {
                    // Where pages are zero the file keeps its hole.
                    if !is_zero {
                        file.write_all_at(bytes, offset).context("cannot write the dump")?;
                    }
                    offset += bytes.len() as u64;
                }
                Ok(())
            }
            Self::Stream { to, at } => {
                while *at < offset {
                    let part =
                        usize::try_from(offset - *at).unwrap_or(ZEROS.len()).min(ZEROS.len());
                    send(to, ZEROS.get(..part).unwrap_or_default())?;
                    *at += part as u64;
                }
                send(to, bytes)?;
                *at += bytes.len() as u64;
                Ok(())
            }
        }
    }

    /// Makes it `len` bytes long and sees to it that they are on disk. Returns how many bytes were
    /// written of what was compressed to a file.
    pub(super) fn finish(&mut self, len: u64) -> Result<Option<u64>> {
        if let Self::File(file) = self {
            file.set_len(len).and_then(|()| file.sync_all()).context("cannot write the dump")?;
            return Ok(None);
        }
        self.put(len, &[])?;
        let Self::Stream { to: Stream::Zstd(encoder), .. } = self else { return Ok(None) };
        encoder.do_finish().map_err(failed)?;
        let file = encoder.get_ref().file();
        let metadata = file.metadata().context("cannot write the dump")?;
        if !metadata.is_file() {
            return Ok(None);
        }
        file.sync_all().context("cannot write the dump")?;
        Ok(Some(metadata.len()))
    }
}

fn encoder(pipe: Pipe) -> io::Result<Encoder<'static, Pipe>> {
    // Level 1 keeps up with a disk, and with hashing.
    let mut encoder = Encoder::new(pipe, 1)?;
    encoder.include_checksum(true)?;
    encoder.multithread(
        std::thread::available_parallelism()
            .map_or(1, |count| u32::try_from(count.get()).unwrap_or(1).min(MAX_THREADS)),
    )?;
    Ok(encoder)
}

fn send(to: &mut Stream, bytes: &[u8]) -> Result<()> {
    to.write_all(bytes).map_err(failed)
}

fn failed(error: io::Error) -> anyhow::Error {
    match error.kind() {
        ErrorKind::BrokenPipe => ClosedPipe { consequence: ": the dump is not complete" }.into(),
        _ => anyhow::Error::new(error).context("cannot write the dump"),
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

/// The bytes in parts of whole pages, as long as can be, that are all zero or have no page that is.
fn runs(mut bytes: &[u8]) -> impl Iterator<Item = (bool, &[u8])> {
    const ZERO_PAGE: [u8; PAGE_SIZE] = [0; PAGE_SIZE];
    let is_zero = |page: &[u8]| ZERO_PAGE.starts_with(page);
    std::iter::from_fn(move || {
        let mut pages = bytes.chunks(PAGE_SIZE);
        let first = is_zero(pages.next()?);
        let more: usize = pages.take_while(|page| is_zero(page) == first).map(<[u8]>::len).sum();
        let (run, rest) = bytes.split_at(bytes.len().min(PAGE_SIZE) + more);
        bytes = rest;
        Some((first, run))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_whole_pages_of_one_kind() {
        let mut bytes = vec![0; 5 * PAGE_SIZE + 7];
        bytes[PAGE_SIZE] = 1;
        bytes[3 * PAGE_SIZE - 1] = 1;
        let lengths: Vec<(bool, usize)> =
            runs(&bytes).map(|(is_zero, run)| (is_zero, run.len())).collect();
        assert_eq!(lengths, [(true, PAGE_SIZE), (false, 2 * PAGE_SIZE), (true, 2 * PAGE_SIZE + 7)]);
        assert_eq!(runs(&bytes).flat_map(|(_, run)| run).copied().collect::<Vec<u8>>(), bytes);
        assert_eq!(runs(&[]).count(), 0);
    }

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
        let error = check_new(&directory.path().join("none/new")).unwrap_err();
        assert!(format!("{error:#}").contains("No such file"), "{error:#}");
    }
}
