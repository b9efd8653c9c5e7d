// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The memory of a process, on its way into a core.

use anyhow::{Context, Result, ensure};
use kvmmem_linux::Space;

use super::digest::Digest;
use super::elf::Load;
use super::pause::{Pause, PauseReport};
use super::process;
use super::sink::Sink;
use crate::interrupt::Interrupt;

/// Bytes that are read at a time.
const CHUNK: u64 = 1 << 20;

/// A process that is being written.
pub(super) struct Writer<'a> {
    pub(super) space: &'a Space<'a>,
    pub(super) sink: &'a mut Sink,
    pub(super) digest: Option<Digest>,
    pub(super) interrupt: &'a Interrupt,
    /// Ended as soon as all memory is read.
    pub(super) pause: Option<Pause>,
    /// Fails where what was read does not belong together.
    pub(super) check: &'a dyn Fn() -> Result<()>,
}

/// What came of it.
pub(super) struct WriteResult {
    pub(super) sha256: Option<String>,
    pub(super) compressed_bytes: Option<u64>,
    pub(super) pause: Option<PauseReport>,
    /// Bytes that could not be read.
    pub(super) unreadable: u64,
}

impl Writer<'_> {
    /// Writes a core of `len` bytes: what comes first, and the memory.
    pub(super) fn write(
        mut self,
        head: &[u8],
        loads: &[Load],
        len: u64,
        progress: impl Fn(u64),
    ) -> Result<WriteResult> {
        self.put(0, head)?;
        let mut buffer = vec![0; usize::try_from(CHUNK)?];
        let mut unreadable = 0;
        for load in loads {
            let mut done = 0;
            while done < load.file_len {
                ensure!(!self.interrupt.has_come(), "interrupted");
                if let Some(pause) = &self.pause {
                    pause.check().context("the target runs again before the process is dumped")?;
                }
                let step = CHUNK.min(load.file_len - done);
                let part =
                    buffer.get_mut(..usize::try_from(step)?).context("the buffer is too small")?;
                unreadable += process::read(self.space, load.virtual_address + done, part)?;
                self.put(load.offset + done, part)?;
                done += step;
                progress(step);
            }
        }
        (self.check)()?;
        let pause = self.pause.take().map(Pause::end).transpose()?;
        let compressed_bytes = self.sink.finish(len)?;
        let sha256 = self.digest.take().map(|digest| digest.finish(len)).transpose()?;
        Ok(WriteResult { sha256, compressed_bytes, pause, unreadable })
    }

    fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.sink.put(offset, bytes)?;
        self.digest.as_mut().map_or(Ok(()), |digest| digest.put(offset, bytes))
    }
}
