// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a VM's RAM lies in: memfds, or the address space of its VMM.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use kvmmem_proto::map::MemoryMap;
use kvmmem_sys::huge_write::write_at;
use rustix::fs::{FsWord, OFlags, SealFlags};
use rustix::io::Errno;

use super::error::RamError;

/// The kernel's number for procfs (`PROC_SUPER_MAGIC`).
const PROCFS: FsWord = 0x9fa0;

/// Where regions lie.
#[derive(Debug)]
pub(super) enum Backing {
    /// In memfds, by their numbers.
    Files(Vec<OwnedFd>),
    /// In a process, of which this is `/proc/PID/mem`; offsets are its virtual addresses. The file
    /// stays with the address space for which it was opened: no process that gets the process id
    /// later is reached by it, nor a program that the process executes. It keeps none of the
    /// memory.
    Process(OwnedFd),
}

impl Backing {
    /// Checks memfds for the regions that lie in them.
    pub(super) fn files(files: Vec<OwnedFd>, map: &MemoryMap) -> Result<Self, RamError> {
        let (found, needed) = (files.len(), map.file_count());
        if found != needed {
            return Err(RamError::Count { found, needed });
        }
        files.iter().try_for_each(check_memfd)?;
        let files = Self::Files(files);
        files.check(map)?;
        Ok(files)
    }

    /// Checks a process's memory for the regions that lie in it.
    pub(super) fn process(memory: OwnedFd, map: &MemoryMap) -> Result<Self, RamError> {
        let kind = rustix::fs::fstatfs(&memory).map_err(RamError::Examine)?.f_type;
        if kind != PROCFS || !is_read_write(&memory)? {
            return Err(RamError::NotMemory);
        }
        let process = Self::Process(memory);
        process.check(map)?;
        Ok(process)
    }

    /// Whether each region is there. A map that has changed may leave files out.
    pub(super) fn check(&self, map: &MemoryMap) -> Result<(), RamError> {
        let count = match self {
            Self::Files(files) => files.len(),
            Self::Process(_) => 1,
        };
        let needed = map.file_count();
        if count < needed {
            return Err(RamError::Count { found: count, needed });
        }
        match self {
            Self::Files(files) => (0..).zip(files).try_for_each(|(number, file)| {
                let size = rustix::fs::fstat(file).map_err(RamError::Examine)?.st_size;
                let (size, needed) = (u64::try_from(size).unwrap_or(0), map.file_size(number));
                if size < needed { Err(RamError::Small { size, needed }) } else { Ok(()) }
            }),
            // What lies between is the VMM's to keep; what it does not is told when it is read.
            Self::Process(_) => map.regions().iter().try_for_each(|region| {
                let ends = [region.offset, region.offset + (region.len - 1)];
                let lacking = ends.into_iter().find(|hva| self.read(0, *hva, &mut [0]) != Ok(1));
                lacking.map_or(Ok(()), |hva| Err(RamError::Unmapped { gpa: region.gpa, hva }))
            }),
        }
    }

    /// Copies bytes out from one place on; returns how many, at least one.
    pub(super) fn read(&self, file: u32, offset: u64, buffer: &mut [u8]) -> Result<usize, Errno> {
        let (source, end) = self.file(file)?;
        retried(end, || rustix::io::pread(source, &mut *buffer, offset))
    }

    /// Copies bytes in from one place on; returns how many, at least one.
    pub(super) fn write(&self, file: u32, offset: u64, data: &[u8]) -> Result<usize, Errno> {
        let (target, end) = self.file(file)?;
        retried(end, || write_at(target.as_fd(), offset, data))
    }

    /// Copies by means of the caller's between a file and elsewhere; returns how many bytes, at
    /// least one.
    pub(super) fn copy(
        &self,
        file: u32,
        copy: impl Fn(BorrowedFd<'_>) -> Result<usize, Errno>,
    ) -> Result<usize, Errno> {
        let (file, end) = self.file(file)?;
        retried(end, || copy(file.as_fd()))
    }

    /// A file, and what it means that nothing of it can be copied.
    fn file(&self, number: u32) -> Result<(&OwnedFd, Errno), Errno> {
        match self {
            Self::Files(files) => {
                let file = usize::try_from(number).ok().and_then(|number| files.get(number));
                file.map(|file| (file, Errno::NXIO)).ok_or(Errno::BADF)
            }
            // The kernel tells by this that the process has ended, or executes another program.
            Self::Process(memory) => Ok((memory, Errno::SRCH)),
        }
    }
}

fn retried(end: Errno, mut copy: impl FnMut() -> Result<usize, Errno>) -> Result<usize, Errno> {
    loop {
        match copy() {
            Ok(0) => return Err(end),
            Err(Errno::INTR) => {}
            copied => return copied,
        }
    }
}

fn is_read_write(file: &OwnedFd) -> Result<bool, RamError> {
    let mode = rustix::fs::fcntl_getfl(file).map_err(RamError::Examine)?;
    Ok(mode & OFlags::RWMODE == OFlags::RDWR)
}

fn check_memfd(file: &OwnedFd) -> Result<(), RamError> {
    let seals = rustix::fs::fcntl_get_seals(file).map_err(RamError::NotMemfd)?;
    if !seals.contains(SealFlags::SHRINK) {
        return Err(RamError::Unsealed);
    }
    if !is_read_write(file)? || seals.intersects(SealFlags::WRITE | SealFlags::FUTURE_WRITE) {
        return Err(RamError::ReadOnly);
    }
    Ok(())
}
