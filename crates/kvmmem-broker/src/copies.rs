// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Copies of a target's memory, for views of RAM that nobody can map.
//!
//! They go by way of a memfd of the peer's: the broker only ever writes to it and reads from it, and needs no more of
//! its own than a chunk. What a peer may copy is looked up for each chunk, so a grant that was taken back ends a copy
//! that is under way.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::fs::SealFlags;
use rustix::io::Errno;

use crate::broker::{Broker, Refused};
use crate::map::Region;
use crate::peer::Peer;
use crate::ram::AccessError;
use crate::registry::Vm;
use crate::scope::Rights;
use crate::wire::{Answer, MAX_COPY, Refusal};

/// How much is copied before it is looked up again whether that is still allowed, bytes.
const CHUNK: usize = 64 * 1024;

/// Bytes of a block of `st_blocks`.
const BLOCK: u64 = 512;

/// What is to be copied.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// Number of the view.
    pub(crate) view: u64,
    /// First guest-physical address.
    pub(crate) gpa: u64,
    /// How many bytes.
    pub(crate) len: u32,
    /// Whether into the target's memory, not out of it.
    pub(crate) write: bool,
}

impl Broker {
    /// Copies between a target's memory and the memfd that came with the request. Ends early where the view reaches no
    /// further, or the VMM has no memory.
    ///
    /// # Errors
    /// Where the connection has no such view, its right has ended or does not reach the first byte, or the memfd is
    /// none.
    pub(crate) fn copy(&self, peer: &Peer, part: Part, files: Vec<OwnedFd>) -> Result<Answer, Refused> {
        let len = usize::try_from(part.len).unwrap_or(usize::MAX);
        let buffer = buffer(files, len)?;
        let mut chunk = vec![0; len.min(CHUNK)];
        let mut done = 0;
        while done < len {
            let gpa = part.gpa.saturating_add(done as u64);
            let (vm, reach) = match self.reach(peer, part, gpa) {
                Err(refused) if done == 0 => return Err(refused),
                Err(_) => break,
                Ok(reached) => reached,
            };
            let wanted = usize::try_from(reach).unwrap_or(usize::MAX).min(len - done);
            let bytes = chunk.get_mut(..wanted.min(CHUNK)).unwrap_or_default();
            let Some(ram) = vm.ram() else { break };
            let copied = if part.write {
                fill(&buffer, bytes, done as u64)?;
                ram.write_some(gpa, bytes)
            } else {
                ram.read_some(gpa, bytes)
            };
            let count = match copied {
                Ok(count) => count,
                // The VMM has ended: the target is as good as gone, and the news of it on its way.
                Err(AccessError::System { source: Errno::SRCH, .. }) if done == 0 => {
                    return Err(Refused::new(Refusal::Unknown, "the target's VMM has ended"));
                }
                Err(_) => break,
            };
            if !part.write {
                empty(&buffer, bytes.get(..count).unwrap_or_default(), done as u64)?;
            }
            done += count;
        }
        Ok(Answer::Copied { len: u32::try_from(done).unwrap_or(u32::MAX) })
    }

    /// The target of a view of a connection's, and how many bytes it reaches from an address on.
    fn reach(&self, peer: &Peer, part: Part, gpa: u64) -> Result<(Arc<Vm>, u64), Refused> {
        let view = part.view;
        let ended = || Refused::new(Refusal::Unknown, format!("view {view} is not open on this connection"));
        let (target, scope) = self.grants().reach(view, peer.number()).ok_or_else(ended)?;
        if part.write && scope.rights != Rights::ReadWrite {
            return Err(Refused::new(Refusal::Denied, format!("view {view} is read-only")));
        }
        let vm = self.registry().get(target).filter(|vm| !vm.is_gone()).ok_or_else(ended)?;
        let regions = vm.ram().map(|ram| scope.regions(&ram.layout().map)).unwrap_or_default();
        let left =
            |region: &Region| region.len.checked_sub(gpa.checked_sub(region.gpa)?).filter(|len| *len > 0);
        match regions.iter().find_map(left) {
            Some(len) => Ok((vm, len)),
            None => {
                Err(Refused::new(Refusal::Invalid, format!("view {view} reaches no RAM at gpa {gpa:#x}")))
            }
        }
    }
}

/// The memfd of a request, if it is one that can be written and read without harm: never a file whose access blocks. It
/// must have its memory already, so that it is the peer who pays for it.
fn buffer(mut files: Vec<OwnedFd>, len: usize) -> Result<OwnedFd, Refused> {
    let invalid = |what: &str| Refused::new(Refusal::Invalid, what);
    if len == 0 || len > MAX_COPY {
        return Err(invalid("a copy has 1 byte to 1 MiB"));
    }
    let (Some(file), true) = (files.pop(), files.is_empty()) else {
        return Err(invalid("a copy comes with one memfd"));
    };
    let seals = rustix::fs::fcntl_get_seals(&file).map_err(|_| invalid("a copy's file is no memfd"))?;
    let stat = rustix::fs::fstat(&file).map_err(|_| invalid("a copy's memfd cannot be examined"))?;
    let size = u64::try_from(stat.st_size).unwrap_or(0);
    let allocated = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(BLOCK);
    if !seals.contains(SealFlags::SHRINK) || size.min(allocated) < len as u64 {
        return Err(invalid("a copy's memfd is too small, not allocated or lacks F_SEAL_SHRINK"));
    }
    Ok(file)
}

/// Reads all of `bytes` from the peer's memfd.
fn fill(buffer: &OwnedFd, mut bytes: &mut [u8], mut at: u64) -> Result<(), Refused> {
    while !bytes.is_empty() {
        let count = moved(rustix::io::pread(buffer, &mut *bytes, at))?;
        bytes = bytes.get_mut(count..).unwrap_or_default();
        at += count as u64;
    }
    Ok(())
}

/// Writes all of `bytes` to the peer's memfd.
fn empty(buffer: &OwnedFd, mut bytes: &[u8], mut at: u64) -> Result<(), Refused> {
    while !bytes.is_empty() {
        let count = moved(rustix::io::pwrite(buffer, bytes, at))?;
        bytes = bytes.get(count..).unwrap_or_default();
        at += count as u64;
    }
    Ok(())
}

/// How many bytes have got through; none at all is a failure too, unless a signal came.
fn moved(result: Result<usize, Errno>) -> Result<usize, Refused> {
    match result {
        Err(Errno::INTR) => Ok(0),
        Ok(0) => Err(Refused::new(Refusal::Invalid, "a copy's memfd ends early")),
        Ok(count) => Ok(count),
        Err(error) => {
            Err(Refused::new(Refusal::Invalid, format!("a copy's memfd cannot be accessed: {error}")))
        }
    }
}
