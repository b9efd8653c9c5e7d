// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's log: the ring buffer of 5.10 and later (kernel/printk/printk_ringbuffer.c), as
//! `dmesg` shows it.
//!
//! All of its layout is in the VMCOREINFO note, so that neither symbols nor types are needed; of a
//! kernel without a note it is in the types. A descriptor's state holds an
//! id; the writer of a record takes the descriptor `id % count`, so that a record is read between
//! two looks at its state. One that was overwritten meanwhile is left out, as the kernel itself
//! does, and counted. So is one that does not fit what leads to it, while it should be there:
//! memory of the log is damaged.

mod error;
mod layout;

use std::time::Duration;

use crate::bytes::Bytes;
use crate::kernel::{Kernel, KernelError};
pub use error::LogError;
use error::MAX_DAMAGED;
use layout::Layout;

/// Descriptors that are read at once.
const BATCH: u64 = 256;

/// Reads of a record that changes, before it is left out.
const TRIES: u32 = 3;

/// `DESC_SV_BITS`: the two highest bits of a descriptor's state variable are its state, the others
/// its id.
const STATE_SHIFT: u32 = 62;
const ID_MASK: u64 = (1 << STATE_SHIFT) - 1;

/// States of a descriptor whose record can be read.
const COMMITTED: u64 = 1;
const FINALIZED: u64 = 2;

/// A place with this bit set holds no text.
const NO_TEXT: u64 = 1;

/// A caller with this bit set is a CPU.
const CALLER_CPU: u32 = 1 << 31;

/// A block of text begins with the id of its descriptor.
const BLOCK_HEADER: u64 = 8;

/// A record of the log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Its number, from 0 on. Numbers are missing where records were lost.
    pub seq: u64,
    /// Since boot.
    pub time: Duration,
    /// From 0, emergency, to 7, debug.
    pub level: u8,
    /// 0 is the kernel; others are as syslog(3) lists them.
    pub facility: u8,
    /// Who wrote it.
    pub caller: Caller,
    /// Subsystem of the device that it is about, or nothing.
    pub subsystem: String,
    /// The device.
    pub device: String,
    /// One line or several. What is not UTF-8 is replaced; control characters may be there.
    pub text: String,
}

/// The context in which a record was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A thread, by its id.
    Thread(u32),
    /// A CPU in an interrupt, or before there were threads.
    Cpu(u32),
}

/// The records of the log, from the oldest to the newest. It ends after an error.
#[derive(Debug)]
pub struct Records<'a> {
    kernel: &'a Kernel<'a>,
    layout: Layout,
    /// Ids that are left: the next one, and how many.
    id: u64,
    left: u64,
    /// Descriptors that were read before their turn: the index of the first, and their bytes.
    batch: (u64, Bytes),
    /// Records that were overwritten while they were read, and that are damaged.
    overwritten: u64,
    damaged: u64,
    /// Bytes of text that can be left: no two records share any.
    text_left: u64,
}

/// The log of a kernel.
///
/// # Errors
/// [`LogError`].
pub fn records<'a>(kernel: &'a Kernel<'a>) -> Result<Records<'a>, LogError> {
    let layout = Layout::new(kernel)?;
    let text_left = layout.size;
    // They are read one after the other, while the kernel may write.
    for _ in 0..TRIES {
        let (oldest, newest) =
            (kernel.read_u64(layout.tail)? & ID_MASK, kernel.read_u64(layout.head)? & ID_MASK);
        let left = (newest.wrapping_sub(oldest) & ID_MASK) + 1;
        if left <= layout.count {
            return Ok(Records {
                kernel,
                layout,
                id: oldest,
                left,
                batch: (0, Bytes::default()),
                overwritten: 0,
                damaged: 0,
                text_left,
            });
        }
    }
    Err(layout.malformed("the distance of the log's first and last record").into())
}

impl Records<'_> {
    /// Records that were overwritten while they were read, up to now.
    pub fn overwritten(&self) -> u64 {
        self.overwritten
    }

    /// Records that should be there and are not whole, up to now.
    pub fn damaged(&self) -> u64 {
        self.damaged
    }

    /// The descriptor of `id`, from the batch.
    fn descriptor(&mut self, id: u64) -> Result<Bytes, LogError> {
        let Layout { descs, count, desc_size, .. } = self.layout;
        let index = id % count;
        let ahead = index.wrapping_sub(self.batch.0);
        if let Some(descriptor) =
            ahead.checked_mul(desc_size).and_then(|at| self.batch.1.part(at, desc_size))
        {
            return Ok(descriptor);
        }
        let at = descs.wrapping_add(index * desc_size);
        let mut bytes = Bytes::zeroed(BATCH.min(count - index).min(self.left) * desc_size);
        if self.kernel.read(at, bytes.as_mut()).is_err() {
            // Of some of them, memory may be missing.
            bytes = Bytes::zeroed(desc_size);
            self.kernel.read(at, bytes.as_mut())?;
        }
        let descriptor = bytes.part(0, desc_size).ok_or(LogError::Note("SIZE(prb_desc)"))?;
        self.batch = (index, bytes);
        Ok(descriptor)
    }

    /// The record of `id`; `None` if the ring does not hold it.
    fn record(&mut self, id: u64) -> Result<Option<Record>, LogError> {
        let mut descriptor = self.descriptor(id)?;
        let gva = self.layout.descs.wrapping_add(id % self.layout.count * self.layout.desc_size);
        for tries in 0..TRIES {
            let state = descriptor.u64(self.layout.state_at);
            // Not finished yet, or its text was overwritten before this walk came to it.
            if state & ID_MASK == id && !is_of(state, id) && tries == 0 {
                return Ok(None);
            }
            if !is_of(state, id) {
                break;
            }
            let record = self.read_record(id, &descriptor)?;
            let state = self.kernel.read_u64(gva.wrapping_add(self.layout.state_at))?;
            match record {
                Some((record, len)) if is_of(state, id) => {
                    let what = || "the length of the log's texts".to_owned();
                    let left = self.text_left.checked_sub(len);
                    self.text_left =
                        left.ok_or_else(|| KernelError::Malformed { what: what(), gva })?;
                    return Ok(Some(record));
                }
                _ => self.kernel.read(gva, descriptor.as_mut())?,
            }
        }
        // What is older than the oldest one was overwritten, and so was what has another state by
        // now.
        let oldest = self.kernel.read_u64(self.layout.tail)? & ID_MASK;
        let is_older = id.wrapping_sub(oldest) & ID_MASK >= self.layout.count;
        let state = self.kernel.read_u64(gva.wrapping_add(self.layout.state_at))?;
        if is_older || state & ID_MASK == id && !is_of(state, id) {
            self.overwritten += 1;
            return Ok(None);
        }
        Err(LogError::Damaged)
    }

    /// What a descriptor leads to, and the bytes of its text; `None` where it does not fit.
    fn read_record(&self, id: u64, descriptor: &Bytes) -> Result<Option<(Record, u64)>, LogError> {
        let layout = &self.layout;
        let mut info = Bytes::zeroed(layout.info_size);
        self.kernel
            .read(layout.infos.wrapping_add(id % layout.count * layout.info_size), info.as_mut())?;
        let seq = info.u64(layout.seq_at);
        // Numbers of records and ids both count up from one that is the index of a descriptor. Each
        // record has its writer.
        if seq % layout.count != id % layout.count || info.is_zero() {
            return Ok(None);
        }
        let (begin, next) = (descriptor.u64(layout.begin_at), descriptor.u64(layout.next_at));
        let len = info.u16(layout.text_len_at);
        let Some(text) = self.text(id, begin, next, len.into())? else { return Ok(None) };
        let caller = info.u32(layout.caller_at);
        let record = Record {
            seq,
            time: Duration::from_nanos(info.u64(layout.time_at)),
            level: info.u8(layout.text_len_at + 3) >> 5,
            facility: info.u8(layout.text_len_at + 2),
            caller: match caller & !CALLER_CPU {
                cpu if caller & CALLER_CPU != 0 => Caller::Cpu(cpu),
                thread => Caller::Thread(thread),
            },
            subsystem: info.string(layout.subsystem_at, layout.subsystem_len),
            device: info.string(layout.device_at, layout.device_len),
            text: String::from_utf8_lossy(&text).into_owned(),
        };
        Ok(Some((record, text.len() as u64)))
    }

    /// The text between two logical positions (get_data() of the kernel).
    fn text(&self, id: u64, begin: u64, next: u64, len: u64) -> Result<Option<Vec<u8>>, LogError> {
        if begin & next & NO_TEXT != 0 {
            return Ok(Some(Vec::new()));
        }
        let (text, size) = (self.layout.text, self.layout.size);
        // A block that does not fit before the ring's end is at its start.
        let is_wrapped = begin / size != next.wrapping_sub(1) / size;
        let (start, end) = if is_wrapped {
            (0, next % size)
        } else {
            (begin % size, (begin % size).wrapping_add(next.wrapping_sub(begin)))
        };
        let Some(room) = end.checked_sub(start + BLOCK_HEADER).filter(|_| end <= size) else {
            return Ok(None);
        };
        if self.kernel.read_u64(text.wrapping_add(start))? & ID_MASK != id {
            return Ok(None);
        }
        let mut bytes = vec![0; usize::try_from(len.min(room)).unwrap_or(0)];
        self.kernel.read(text.wrapping_add(start + BLOCK_HEADER), &mut bytes)?;
        // The kernel formats texts as strings of C.
        Ok(Some(bytes).filter(|bytes| !bytes.contains(&0)))
    }
}

impl Iterator for Records<'_> {
    type Item = Result<Record, LogError>;

    fn next(&mut self) -> Option<Self::Item> {
        while self.left > 0 {
            let found = match self.record(self.id) {
                Err(error) if error.is_local() && self.damaged < MAX_DAMAGED => {
                    self.damaged += 1;
                    None
                }
                found => found.transpose(),
            };
            self.id = (self.id + 1) & ID_MASK;
            self.left = if matches!(found, Some(Err(_))) { 0 } else { self.left - 1 };
            if found.is_some() {
                return found;
            }
        }
        None
    }
}

/// Whether the record of `id` can be read by its state variable.
fn is_of(state: u64, id: u64) -> bool {
    matches!(state >> STATE_SHIFT, COMMITTED | FINALIZED) && state & ID_MASK == id
}
