// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where everything is in the log's ring buffer, from the VMCOREINFO note or the types.

use super::error::LogError;
use crate::kernel::{Kernel, KernelError};

/// Limits of descriptors and bytes of text: those of a log of 4 GiB, more than a kernel can be
/// configured to have.
const MAX_COUNT_BITS: u32 = 26;
const MAX_SIZE_BITS: u32 = 32;

/// Where everything is in the ring buffer.
#[derive(Debug)]
pub(super) struct Layout {
    /// The ring buffer.
    ring: u64,
    /// Where the ids of the oldest and the newest record are.
    pub(super) tail: u64,
    pub(super) head: u64,
    pub(super) descs: u64,
    pub(super) infos: u64,
    pub(super) count: u64,
    pub(super) text: u64,
    pub(super) size: u64,
    pub(super) desc_size: u64,
    pub(super) state_at: u64,
    pub(super) begin_at: u64,
    pub(super) next_at: u64,
    pub(super) info_size: u64,
    pub(super) seq_at: u64,
    pub(super) time_at: u64,
    /// After it come `facility`, and `flags` with the level in its highest three bits.
    pub(super) text_len_at: u64,
    pub(super) caller_at: u64,
    pub(super) subsystem_at: u64,
    pub(super) subsystem_len: u64,
    pub(super) device_at: u64,
    pub(super) device_len: u64,
}

impl Layout {
    pub(super) fn new(kernel: &Kernel<'_>) -> Result<Self, LogError> {
        let note = kernel.note();
        let number = |key: &'static str| {
            let value = match note.number(key) {
                None if note.gpa.is_none() => Some(of_types(kernel, key)?),
                value => value.and_then(|value| u64::try_from(value).ok()),
            };
            // Offsets into structures: a larger number is not an offset.
            value.filter(|value| *value < 4096).ok_or(LogError::Note(key))
        };
        let prb = note.symbol("prb").ok_or(LogError::Note("SYMBOL(prb)"))?;
        let ring = kernel.read_u64(prb)?;
        let counter = number("OFFSET(atomic_long_t.counter)")?;
        let desc_ring = ring.wrapping_add(number("OFFSET(printk_ringbuffer.desc_ring)")?);
        let text_ring = ring.wrapping_add(number("OFFSET(printk_ringbuffer.text_data_ring)")?);
        let power = |bits: u32, most: u32| {
            (bits <= most)
                .then(|| 1_u64 << bits)
                .ok_or_else(|| malformed("the size of the log's ring buffer", ring))
        };
        let count_bits =
            kernel.read_u32(desc_ring.wrapping_add(number("OFFSET(prb_desc_ring.count_bits)")?))?;
        let size_bits =
            kernel.read_u32(text_ring.wrapping_add(number("OFFSET(prb_data_ring.size_bits)")?))?;
        let lpos_at = number("OFFSET(prb_desc.text_blk_lpos)")?;
        let dev_at = number("OFFSET(printk_info.dev_info)")?;
        let id =
            |key| Ok::<_, LogError>(desc_ring.wrapping_add(number(key)?).wrapping_add(counter));
        Ok(Self {
            ring,
            tail: id("OFFSET(prb_desc_ring.tail_id)")?,
            head: id("OFFSET(prb_desc_ring.head_id)")?,
            descs: kernel
                .read_u64(desc_ring.wrapping_add(number("OFFSET(prb_desc_ring.descs)")?))?,
            infos: kernel
                .read_u64(desc_ring.wrapping_add(number("OFFSET(prb_desc_ring.infos)")?))?,
            count: power(count_bits, MAX_COUNT_BITS)?,
            text: kernel.read_u64(text_ring.wrapping_add(number("OFFSET(prb_data_ring.data)")?))?,
            size: power(size_bits, MAX_SIZE_BITS)?,
            desc_size: number("SIZE(prb_desc)")?,
            state_at: number("OFFSET(prb_desc.state_var)")? + counter,
            begin_at: lpos_at + number("OFFSET(prb_data_blk_lpos.begin)")?,
            next_at: lpos_at + number("OFFSET(prb_data_blk_lpos.next)")?,
            info_size: number("SIZE(printk_info)")?,
            seq_at: number("OFFSET(printk_info.seq)")?,
            time_at: number("OFFSET(printk_info.ts_nsec)")?,
            text_len_at: number("OFFSET(printk_info.text_len)")?,
            caller_at: number("OFFSET(printk_info.caller_id)")?,
            subsystem_at: dev_at + number("OFFSET(dev_printk_info.subsystem)")?,
            subsystem_len: number("LENGTH(printk_info_subsystem)")?,
            device_at: dev_at + number("OFFSET(dev_printk_info.device)")?,
            device_len: number("LENGTH(printk_info_device)")?,
        })
    }

    /// The ring buffer is malformed.
    pub(super) fn malformed(&self, what: &str) -> KernelError {
        malformed(what, self.ring)
    }
}

fn malformed(what: &str, gva: u64) -> KernelError {
    KernelError::Malformed { what: what.to_owned(), gva }
}

/// The lines of a kernel's note, computed from its types.
fn of_types(kernel: &Kernel<'_>, key: &str) -> Result<u64, KernelError> {
    match key {
        "LENGTH(printk_info_subsystem)" => Ok(kernel.member("dev_printk_info", "subsystem")?.size),
        "LENGTH(printk_info_device)" => Ok(kernel.member("dev_printk_info", "device")?.size),
        key => kernel.of_key(key),
    }
}
