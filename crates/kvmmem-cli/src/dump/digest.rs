// SPDX-License-Identifier: Apache-2.0 OR MIT
//! SHA-256 of the file while it is written, on a thread of its own: it takes longer than the
//! copying, so that buffers are handed over and not copied.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::mpsc::{Receiver, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use anyhow::{Context, Result, anyhow};
use sha2::{Digest as _, Sha256};

/// How many buffers wait for the thread at most.
const DEPTH: usize = 4;

/// Bytes that are hashed at a time where there is no buffer.
const CHUNK: usize = 1 << 20;

/// The digest of what was put in, in order; what is left out is zeros.
pub(super) struct Digest {
    parts: SyncSender<Part>,
    /// Buffers that the thread is done with.
    spare: Receiver<Vec<u8>>,
    thread: JoinHandle<String>,
    /// How many bytes are in.
    at: u64,
}

enum Part {
    Bytes(Vec<u8>),
    Zeros(u64),
}

impl Digest {
    pub(super) fn start() -> Result<Self> {
        let (parts, work) = sync_channel(DEPTH);
        let (done, spare) = channel();
        let hash = move || {
            let (mut hasher, zeros) = (Sha256::new(), vec![0; CHUNK]);
            for part in work {
                match part {
                    Part::Bytes(bytes) => {
                        hasher.update(&bytes);
                        // The other side may have ended.
                        let _ = done.send(bytes);
                    }
                    Part::Zeros(mut count) => {
                        while count > 0 {
                            let part = usize::try_from(count).unwrap_or(CHUNK).min(CHUNK);
                            hasher.update(zeros.get(..part).unwrap_or_default());
                            count -= part as u64;
                        }
                    }
                }
            }
            hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
        };
        let thread = std::thread::Builder::new().name("sha256".into()).spawn(hash);
        Ok(Self { parts, spare, thread: thread.context("cannot start a thread")?, at: 0 })
    }

    /// Puts in what lies at `offset`, which is not below what was put in before.
    pub(super) fn put(&mut self, offset: u64, bytes: &[u8]) -> Result<()> {
        self.put_buffer(offset, &mut bytes.to_vec())
    }

    /// As [`Digest::put`], with a buffer that is exchanged for another one of any content.
    pub(super) fn put_buffer(&mut self, offset: u64, buffer: &mut Vec<u8>) -> Result<()> {
        self.skip_to(offset)?;
        self.at += buffer.len() as u64;
        let spare = self.spare.try_recv().unwrap_or_default();
        self.send(Part::Bytes(std::mem::replace(buffer, spare)))
    }

    /// Puts in the first `len` bytes of a file.
    pub(super) fn put_file(&mut self, file: &File, len: u64) -> Result<()> {
        let mut buffer = Vec::new();
        while self.at < len {
            let part = usize::try_from(len - self.at).unwrap_or(CHUNK).min(CHUNK);
            buffer.resize(part, 0);
            file.read_exact_at(&mut buffer, self.at)
                .context("cannot read what is there of the dump")?;
            self.put_buffer(self.at, &mut buffer)?;
        }
        Ok(())
    }

    /// The digest of `len` bytes, as hexadecimal digits.
    pub(super) fn finish(mut self, len: u64) -> Result<String> {
        self.skip_to(len)?;
        drop(self.parts);
        self.thread.join().map_err(|_| anyhow!("the thread that hashes has ended"))
    }

    fn skip_to(&mut self, offset: u64) -> Result<()> {
        let count = offset.saturating_sub(self.at);
        self.at += count;
        if count > 0 { self.send(Part::Zeros(count)) } else { Ok(()) }
    }

    fn send(&self, part: Part) -> Result<()> {
        self.parts.send(part).map_err(|_| anyhow!("the thread that hashes has ended"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_out_is_zeros() {
        let mut whole = vec![0; 3 * CHUNK + 5];
        whole[10..13].copy_from_slice(b"abc");
        whole[2 * CHUNK..2 * CHUNK + 3].copy_from_slice(b"def");
        let expected: String =
            Sha256::digest(&whole).iter().map(|byte| format!("{byte:02x}")).collect();
        let mut digest = Digest::start().unwrap();
        digest.put(10, b"abc").unwrap();
        digest.put(2 * CHUNK as u64, b"def").unwrap();
        assert_eq!(digest.finish(whole.len() as u64).unwrap(), expected);

        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&whole, 0).unwrap();
        let mut digest = Digest::start().unwrap();
        digest.put_file(&file, CHUNK as u64 + 7).unwrap();
        digest.put(2 * CHUNK as u64, b"def").unwrap();
        assert_eq!(digest.finish(whole.len() as u64).unwrap(), expected);
    }
}
