// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The ioctls of a view on `/dev/kvmmem` ([`kvmmem_abi::native`]).

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;

use kvmmem_abi::native::{ATTACH, Attach, DETACH, INFO, Info, RANGES, Range, Ranges, STATS, Stats};
use rustix::io::Errno;
use rustix::ioctl::{Getter, NoArg, Setter, Updater, ioctl};

use crate::device::{OpenError, open};

/// How much room there is for ranges at first.
const FIRST_CAPACITY: u32 = 16;

/// No view has more ranges; one that says so is not believed.
const MAX_CAPACITY: u32 = 1 << 16;

/// An open `/dev/kvmmem` that can become a view. All else is done by `pread`, `pwrite`, `lseek`,
/// `poll` and `mmap`.
///
/// # Invariants
///
/// The file is a miscellaneous character device, which the caller of [`ViewFile::open`] named as
/// kvmmem's.
#[derive(Debug)]
pub struct ViewFile {
    file: File,
}

impl ViewFile {
    /// Opens the device at `path`, close-on-exec.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Ok(Self { file: open(path)? })
    }

    /// `KVMMEM_INFO`: what the driver and its host can do.
    ///
    /// # Errors
    /// `ENOTTY`, where the driver is older than views.
    pub fn info(&self) -> Result<Info, Errno> {
        // SAFETY: the number says that 32 bytes are written to the pointer, and `Getter` passes one
        // to a structure of that size, of which any content is right. Any other misc device
        // knows no such number and answers ENOTTY.
        unsafe { ioctl(&self.file, Getter::<{ INFO }, Info>::new()) }
    }

    /// `KVMMEM_ATTACH`: opens the view; the token is used up, also by most failures.
    ///
    /// # Errors
    /// The driver's errno (docs/reference/abi.md).
    pub fn attach(&self, argument: Attach) -> Result<(), Errno> {
        // SAFETY: the number says that 40 bytes are read from the pointer, and `Setter` passes one
        // to its own copy of a structure of that size. Nothing of this process's memory
        // changes.
        unsafe { ioctl(&self.file, Setter::<{ ATTACH }, Attach>::new(argument)) }
    }

    /// `KVMMEM_RANGES`: the view's state, and its ranges, which ascend. Takes the event that `poll`
    /// reports.
    ///
    /// # Errors
    /// The driver's errno (docs/reference/abi.md); `EAGAIN` if the ranges change more quickly than
    /// they can be read.
    pub fn ranges(&self) -> Result<(Ranges, Vec<Range>), Errno> {
        let mut capacity = FIRST_CAPACITY;
        for _ in 0..8 {
            let mut room = vec![Range::default(); capacity as usize];
            let mut argument = Ranges {
                capacity,
                ranges: room.as_mut_ptr().expose_provenance() as u64,
                ..Ranges::default()
            };
            // SAFETY: the number says that 48 bytes are read from and written to the pointer, and
            // `Updater` passes one to a structure of that size. At the address in it
            // the driver writes no more than `capacity` ranges: that is how many `room`
            // holds, which lives on and is not accessed until after the call; any content
            // of both is right. Any other misc device knows no such number and answers ENOTTY.
            unsafe { ioctl(&self.file, Updater::<{ RANGES }, Ranges>::new(&mut argument)) }?;
            if argument.count <= capacity {
                room.truncate(argument.count as usize);
                return Ok((argument, room));
            }
            capacity = argument.count.min(MAX_CAPACITY);
        }
        Err(Errno::AGAIN)
    }

    /// `KVMMEM_DETACH`: closes the view.
    ///
    /// # Errors
    /// The driver's errno (docs/reference/abi.md).
    pub fn detach(&self) -> Result<(), Errno> {
        // SAFETY: the ioctl has no argument; of this process's memory it changes only mappings of
        // this file, which are foreign memory that may vanish at any moment.
        unsafe { ioctl(&self.file, NoArg::<{ DETACH }>::new()) }
    }

    /// `KVMMEM_STATS`: the view's counters.
    ///
    /// # Errors
    /// The driver's errno (docs/reference/abi.md).
    pub fn stats(&self) -> Result<Stats, Errno> {
        // SAFETY: the number says that 64 bytes are written to the pointer, and `Getter` passes one
        // to a structure of that size, for which any bytes are valid.
        unsafe { ioctl(&self.file, Getter::<{ STATS }, Stats>::new()) }
    }
}

impl AsFd for ViewFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where another misc device may be opened, it must refuse every number.
    #[test]
    fn another_misc_device_refuses_the_ioctls() {
        for path in ["/dev/kvm", "/dev/fuse", "/dev/net/tun", "/dev/loop-control"] {
            let Ok(file) = ViewFile::open(Path::new(path)) else { continue };
            assert!(file.info().is_err(), "{path}");
            assert!(file.ranges().is_err(), "{path}");
            assert!(file.stats().is_err(), "{path}");
            assert!(file.detach().is_err(), "{path}");
        }
        assert!(matches!(ViewFile::open(Path::new("/dev/null")), Err(OpenError::NotMisc)));
    }
}
