// SPDX-License-Identifier: Apache-2.0 OR MIT
//! BAR 2 of a function, mapped into this process.
//!
//! Unplugging the device does not take the mapping away: it reads zeros then, and later what is
//! plugged in next at that address. The open file tells: its `read` fails with EIO while the device
//! is there, and with ENODEV from before its memory goes. So what was read is the device's if the
//! file says afterwards that the device is there.

use std::os::fd::{AsFd, OwnedFd};

use kvmmem_proto::map::PAGE_SIZE;
use kvmmem_sys::foreign::Foreign;
use rustix::fs::{FlockOperation, flock};
use rustix::io::{Errno, pread};

use super::function::{Function, Kind};

/// Whether a device is there, asked of its open file. In tests, ordinary files are in the devices'
/// place.
pub(super) type IsAlive = fn(&OwnedFd) -> bool;

/// What the kernel says: it has no `read` for a BAR that is memory.
pub(super) fn is_alive(file: &OwnedFd) -> bool {
    pread(file, &mut [0; 1], 0) == Err(Errno::IO)
}

/// A BAR that is mapped.
#[derive(Debug)]
pub(super) struct Bar {
    file: OwnedFd,
    kind: Kind,
    memory: Foreign,
    is_alive: IsAlive,
}

impl Bar {
    /// Maps all `len` bytes of a function's BAR.
    pub(super) fn map(
        function: &Function,
        len: u64,
        kind: Kind,
        is_writable: bool,
        is_alive: IsAlive,
    ) -> Result<Self, Errno> {
        let file = function.open(kind, is_writable)?;
        let memory = reserve(len, 0, kind, is_writable)?;
        place(&memory, 0, len, &file, 0)?;
        Ok(Self { file, kind, memory, is_alive })
    }

    pub(super) fn memory(&self) -> &Foreign {
        &self.memory
    }

    pub(super) fn len(&self) -> u64 {
        self.memory.len()
    }

    /// Whether the device is there, and was until now.
    pub(super) fn is_alive(&self) -> bool {
        (self.is_alive)(&self.file)
    }

    /// Locks the file for this process; `false` where another one has.
    pub(super) fn lock(&self) -> Result<bool, Errno> {
        match flock(&self.file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(true),
            Err(Errno::WOULDBLOCK) => Ok(false),
            Err(errno) => Err(errno),
        }
    }

    /// Memory for a mapping of `len` bytes whose address is congruent to `like`.
    pub(super) fn reserve_like(&self, len: u64, like: u64) -> Result<Foreign, Errno> {
        reserve(len, like, self.kind, self.memory.is_writable())
    }

    /// Maps `len` bytes from `from` on at `offset` of `memory`, too.
    pub(super) fn place(
        &self,
        memory: &Foreign,
        offset: u64,
        len: u64,
        from: u64,
    ) -> Result<(), Errno> {
        place(memory, offset, len, &self.file, from)
    }
}

fn reserve(len: u64, like: u64, kind: Kind, is_writable: bool) -> Result<Foreign, Errno> {
    let memory = Foreign::reserve(len, like, is_writable, PAGE_SIZE)?;
    Ok(if kind == Kind::WriteCombining { memory.write_combining() } else { memory })
}

/// A forked child would keep the mapping, and no one could tell the host when it is gone.
fn place(memory: &Foreign, offset: u64, len: u64, file: &OwnedFd, from: u64) -> Result<(), Errno> {
    memory.place(offset, len, file.as_fd(), from)?;
    memory.keep_from_children()
}
