// SPDX-License-Identifier: Apache-2.0 OR MIT
//! v1's ioctls of `/dev/kvmmem` ([`kvmmem_abi::ioctl`]), on a page that the caller owns.

use std::fs::{File, OpenOptions};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use kvmmem_abi::ioctl::{MEM_MAP, MEM_UNMAP, MapMemToken, MemMap};
use rustix::io::Errno;
use rustix::ioctl::{IntegerSetter, Setter, ioctl};

use crate::page::Page;

/// Major number of miscellaneous character devices (`MISC_MAJOR` of `<linux/major.h>`), which
/// `/dev/kvmmem` is one of.
const MISC_MAJOR: u32 = 10;

/// Why the device could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// `open` or `stat` failed.
    #[error("cannot open the device")]
    Open(#[source] std::io::Error),
    /// The path leads to something else.
    #[error("this is not a miscellaneous character device")]
    NotMisc,
}

/// An open `/dev/kvmmem`. Closing it undoes every mapping made through it.
///
/// # Invariants
///
/// The file is a miscellaneous character device, which the caller of [`Device::open`] named as
/// kvmmem's.
#[derive(Debug)]
pub struct Device {
    file: File,
}

impl Device {
    /// Opens the device at `path`, close-on-exec.
    ///
    /// # Errors
    /// [`OpenError`].
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        Ok(Self { file: open(path)? })
    }

    /// `KVM_INTRO_MEM_MAP`: replaces `page` by the page at `gpa` of the virtual machine that
    /// `token` names.
    ///
    /// From then on the page's content is the other machine's. The token is used up, also by most
    /// failures.
    ///
    /// # Errors
    /// The driver's errno (docs/reference/abi.md).
    pub fn map(&self, token: MapMemToken, gpa: u64, page: &Page) -> Result<(), Errno> {
        let argument = MemMap { token, gpa, gva: page.address() as u64 };
        // SAFETY: the number says that 48 bytes are read from the pointer, and `Setter` passes one
        // to its own copy of a structure of that size. What the driver changes is the
        // content of the page at `gva`: the page is there, whole and writable, because
        // `page` owns it, and only its volatile accessors look at it, for which any content
        // at any time is right. Any other misc device knows no such number and answers ENOTTY.
        unsafe { ioctl(self.file.as_fd(), Setter::<{ MEM_MAP }, MemMap>::new(argument)) }
    }

    /// `KVM_INTRO_MEM_UNMAP`: gives `page` fresh memory of its own, all zeros.
    ///
    /// # Errors
    /// The driver's errno (docs/reference/abi.md).
    pub fn unmap(&self, page: &Page) -> Result<(), Errno> {
        // SAFETY: the argument is a number to the driver, the address that identifies the mapping;
        // what changes is the content of the page at that address, which `page` owns, as in
        // `map`.
        unsafe {
            ioctl(self.file.as_fd(), IntegerSetter::<{ MEM_UNMAP }>::new_usize(page.address()))
        }
    }
}

/// Opens what must be a miscellaneous character device.
pub(crate) fn open(path: &Path) -> Result<File, OpenError> {
    // Non-blocking, so that a path that leads to a FIFO cannot hang the caller.
    let flags = i32::try_from(rustix::fs::OFlags::NONBLOCK.bits()).unwrap_or(0);
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(flags)
        .open(path)
        .map_err(OpenError::Open)?;
    let metadata = file.metadata().map_err(OpenError::Open)?;
    if !metadata.file_type().is_char_device() || rustix::fs::major(metadata.rdev()) != MISC_MAJOR {
        return Err(OpenError::NotMisc);
    }
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn other_files_are_refused() {
        for path in ["/dev/null", "/proc/self/status", "/"] {
            assert!(Device::open(Path::new(path)).is_err(), "{path}");
        }
        assert!(matches!(Device::open(Path::new("/dev/null")), Err(OpenError::NotMisc)));
    }

    #[test]
    fn a_missing_device_says_so() {
        let error = Device::open(Path::new("/nonexistent/kvmmem")).unwrap_err();
        let OpenError::Open(source) = error else { panic!("{error}") };
        assert_eq!(source.kind(), std::io::ErrorKind::NotFound);
    }

    /// Where another misc device may be opened, it must refuse both numbers and leave the page
    /// alone.
    #[test]
    fn another_misc_device_refuses_the_ioctls() {
        let Ok(device) = Device::open(Path::new("/dev/kvm")) else {
            // Past the test harness, which would keep it to itself.
            let note = "skipped: /dev/kvm cannot be opened: run on a host with KVM, as a member of group kvm\n";
            std::io::stderr().write_all(note.as_bytes()).unwrap();
            return;
        };
        let page = Page::new().unwrap();
        page.write_u64(0, 7).unwrap();
        assert!(device.map(MapMemToken { token: [1, 2, 3, 4] }, 0x1000, &page).is_err());
        assert!(device.unmap(&page).is_err());
        assert_eq!(page.read_u64(0).unwrap(), 7);
    }
}
