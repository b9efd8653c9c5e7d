// SPDX-License-Identifier: GPL-2.0-only
//! An answered ATTACH: the host shows a window until this is dropped. What its descriptor page says is copied before it
//! is looked at, and checked before it is believed.

use core::mem::offset_of;

use kernel::prelude::*;
use kernel::time::Delta;
use kernel::time::delay::fsleep;
use kernel::uaccess::UserSliceReader;

use crate::abi::descriptor::{Descriptor, DescriptorError, GENERATION_AT, MAX_RANGES, SIZE, WindowRange};
use crate::abi::hypercall::{AttachRequest, AttachResult};
use crate::abi::ioctl::PAGE_SIZE;
use crate::hypercall::{self, Way};
use crate::stats;
use crate::sys::{self, Remapped};

/// How often the page is looked at, and how long it is waited between two times, while the host is changing it.
const TRIES: u32 = 1000;
const PAUSE: Delta = Delta::from_millis(1);

/// A request to attach, in memory that the host reads it from. Erased when dropped: it holds the token.
pub(crate) struct AttachCall(KBox<[u8; AttachRequest::SIZE]>);

impl AttachCall {
    /// Takes the token, the next 32 bytes, from a tool's request: `EFAULT` where they cannot be read.
    pub(crate) fn read_token(from: &mut UserSliceReader) -> Result<Self> {
        const TOKEN: usize = offset_of!(AttachRequest, pid);
        let mut call = Self(KBox::new([0; AttachRequest::SIZE], GFP_KERNEL)?);
        from.read_slice(call.0.split_at_mut(TOKEN).0)?;
        Ok(call)
    }

    /// Asks the host for the view, with these flags. The token is used.
    pub(crate) fn call(mut self, flags: u32) -> Result<Attachment> {
        let way = hypercall::way()?;
        let (pid, uid, comm) = sys::caller();
        self.put(offset_of!(AttachRequest, pid), &pid.to_ne_bytes());
        self.put(offset_of!(AttachRequest, uid), &uid.to_ne_bytes());
        self.put(offset_of!(AttachRequest, comm), &comm);
        self.put(offset_of!(AttachRequest, flags), &flags.to_ne_bytes());
        // On the heap, because stacks may have no address that the host can translate by the page.
        let mut result = KBox::new(AttachResult::default(), GFP_KERNEL)?;
        sys::attach(way, self.bytes(), &mut result).map_err(|answer| {
            stats::REFUSED.add_one();
            hypercall::error(answer)
        })?;
        let gpa = crate::test_descriptor(&*self.0).unwrap_or(result.descriptor_gpa);
        match Remapped::map(gpa, PAGE_SIZE) {
            Ok(page) => Ok(Attachment { way, page }),
            Err(error) => {
                stats::lie("the descriptor's page is no memory of a window");
                // Names the view all the same, if the host believes itself.
                let _ = sys::detach(way, gpa);
                Err(if error == ENOMEM { ENOMEM } else { EIO })
            }
        }
    }

    /// The bytes, of which the token is the first 32.
    pub(crate) fn bytes(&self) -> &[u8; AttachRequest::SIZE] {
        &self.0
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        if let Some(place) = self.0.get_mut(at..at + bytes.len()) {
            place.copy_from_slice(bytes);
        }
    }
}

impl Drop for AttachCall {
    fn drop(&mut self) {
        sys::erase(&mut *self.0);
    }
}

/// A view, as the host knows it.
pub(crate) struct Attachment {
    way: Way,
    page: Remapped,
}

/// A copy of the descriptor page, checked.
pub(crate) struct Snapshot {
    pub(crate) descriptor: Descriptor,
    ranges: KBox<[WindowRange; MAX_RANGES]>,
}

impl Snapshot {
    pub(crate) fn ranges(&self) -> &[WindowRange] {
        self.ranges.get(..self.descriptor.range_count).unwrap_or(&[])
    }
}

impl Attachment {
    /// Where the host put the descriptor's page, which names the view to it.
    pub(crate) fn gpa(&self) -> u64 {
        self.page.gpa()
    }

    /// The generation that the page shows at this moment; odd while the host is changing it.
    pub(crate) fn generation(&self) -> u64 {
        self.page.read_u64(GENERATION_AT)
    }

    /// What the page says. `EIO` where that cannot be, or where the host does not finish changing it.
    pub(crate) fn read(&self) -> Result<Snapshot> {
        let mut copy = KBox::new([0; SIZE], GFP_KERNEL)?;
        let mut ranges = KBox::new([WindowRange::default(); MAX_RANGES], GFP_KERNEL)?;
        for _ in 0..TRIES {
            let generation = self.generation();
            for (index, word) in copy.chunks_exact_mut(8).enumerate() {
                word.copy_from_slice(&self.page.read_u64(8 * index).to_le_bytes());
            }
            // x86 reads in the order of the program, and volatile reads stay in it.
            if self.generation() == generation {
                // Window 0 is the only one that a hypercall opens.
                match Descriptor::read(&copy, &mut ranges, |_| None) {
                    Ok(descriptor) if descriptor.generation == generation => {
                        return Ok(Snapshot { descriptor, ranges });
                    }
                    Ok(_) | Err(DescriptorError::Changing) => {}
                    Err(error) => {
                        stats::lie(reason(error));
                        return Err(EIO);
                    }
                }
            }
            fsleep(PAUSE);
        }
        stats::lie("the descriptor does not stop changing");
        Err(EIO)
    }

    /// Asks the host for the next data (or hole: `what`) from `gpa` on. `None` where there is none, `EOPNOTSUPP` where
    /// the host does not know.
    pub(crate) fn seek(&self, gpa: u64, what: u64) -> Result<Option<u64>> {
        let mut found = KBox::new(gpa, GFP_KERNEL)?;
        match sys::seek(self.way, self.page.gpa(), &mut found, what).map_err(hypercall::error) {
            Ok(()) if *found >= gpa => Ok(Some(*found)),
            Ok(()) => {
                stats::lie("it found an address before the one to begin at");
                Err(EIO)
            }
            Err(error) if error == ENOENT => Ok(None),
            Err(error) => Err(error),
        }
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        // Nothing of this machine's own is behind the window, so a refusal harms nobody here; but the host still shows
        // the target's memory there.
        if sys::detach(self.way, self.page.gpa()).is_err() {
            stats::REFUSED.add_one();
            stats::VIEWS_QUARANTINED.add_one();
        }
    }
}

fn reason(error: DescriptorError) -> &'static str {
    match error {
        DescriptorError::Magic => "there is no descriptor where it should be",
        DescriptorError::Version => "the descriptor is of another version",
        DescriptorError::Changing => "the descriptor is changing",
        DescriptorError::Header => "the descriptor's header is not possible",
        DescriptorError::Range => "a range of the descriptor is not possible",
    }
}
