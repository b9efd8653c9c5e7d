// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a dump goes: a new file, which keeps its holes, or a stream (a pipe, a FIFO, a device),
//! which gets every byte in order. It is opened before a token is used, so that a mistake in the
//! path costs none.

use std::fs::File;
use std::io::{self, ErrorKind, Write};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use kvmmem::PAGE_SIZE;
use serde::Serialize;
use zstd::stream::write::Encoder;

use super::path::Kind;
use super::pipe::Pipe;
use crate::failure::ClosedPipe;
use crate::interrupt::Interrupt;

/// Zeros that are written to a stream at a time.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// How long a pipe may be full while the target is paused.
const STALL: Duration = Duration::from_secs(30);

/// The most threads that compress.
const MAX_THREADS: u32 = 4;

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
}
