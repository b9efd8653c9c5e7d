// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `/dev/kvmmem`: another virtual machine's pages in this process.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvmmem_abi::ioctl::MapMemToken;
use kvmmem_kvmi::token::Token;
use kvmmem_sys::device::{Device as Ioctls, OpenError};
use kvmmem_sys::page::{Page, PageError};
use rustix::io::Errno;

use crate::explain;

/// Where udev puts the device.
pub const DEFAULT_PATH: &str = "/dev/kvmmem";

/// Environment variable that names another path for [`Device::open_default`].
pub const PATH_VARIABLE: &str = "KVMMEM_DEVICE";

/// Why the device could not be used.
#[derive(Debug, thiserror::Error)]
pub enum DeviceError {
    /// The device could not be opened.
    #[error("cannot open {}{remedy}", path.display())]
    Open {
        /// The device's path.
        path: PathBuf,
        /// What to do about it, where that is known.
        remedy: &'static str,
        /// What went wrong.
        #[source]
        source: OpenError,
    },
    /// This process could not make a page to be replaced.
    #[error("cannot make a page to map over")]
    Page(#[source] PageError),
    /// MAP failed; the token is most likely used up.
    #[error("cannot map the target's page at gpa {gpa:#x}: {}", explain::map(*.source))]
    Map {
        /// Guest-physical address in the target.
        gpa: u64,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// UNMAP failed; the page's address is not used again by this process.
    #[error("cannot undo the mapping of gpa {gpa:#x} at gva {gva:#x}: {}", explain::unmap(*.source))]
    Unmap {
        /// Guest-physical address in the target.
        gpa: u64,
        /// Address in this process.
        gva: usize,
        /// The system's answer.
        #[source]
        source: Errno,
    },
}

impl DeviceError {
    /// The errno behind the error, where a system call failed.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Open { source: OpenError::Open(error), .. } => error.raw_os_error(),
            Self::Open { source: OpenError::NotMisc, .. } => None,
            Self::Page(PageError::Map(errno) | PageError::Advise { source: errno, .. }) => {
                Some(errno.raw_os_error())
            }
            Self::Page(_) => None,
            Self::Map { source, .. } | Self::Unmap { source, .. } => Some(source.raw_os_error()),
        }
    }
}

/// The open device. Clones share one open file, which is closed with the last of them and of its
/// pages.
///
/// It serves the process that opened it alone: after a fork, the child opens its own.
#[derive(Clone, Debug)]
pub struct Device {
    ioctls: Arc<Ioctls>,
}

impl Device {
    /// Opens the device at `path`.
    ///
    /// # Errors
    /// [`DeviceError::Open`], with what to do about it.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, DeviceError> {
        let path = path.as_ref();
        match Ioctls::open(path) {
            Ok(ioctls) => Ok(Self { ioctls: Arc::new(ioctls) }),
            Err(source) => {
                let remedy = match &source {
                    OpenError::Open(error) => explain::open(error),
                    OpenError::NotMisc => "",
                };
                Err(DeviceError::Open { path: path.to_owned(), remedy, source })
            }
        }
    }

    /// Opens the device that [`PATH_VARIABLE`] names, or else [`DEFAULT_PATH`].
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open_default() -> Result<Self, DeviceError> {
        Self::open(default_path())
    }

    /// Maps the page at `gpa`, a multiple of 4096, of the virtual machine that `token` names,
    /// readable and writable.
    ///
    /// The token is used up, also by most failures: ask for another one to try again.
    ///
    /// # Errors
    /// [`DeviceError::Map`] where the driver or the host refuses, [`DeviceError::Page`] where there
    /// is no memory.
    pub fn map(&self, token: Token, gpa: u64) -> Result<MappedPage, DeviceError> {
        let page = Page::new().map_err(DeviceError::Page)?;
        let words = MapMemToken { token: token.words() };
        self.ioctls.map(words, gpa, &page).map_err(|source| DeviceError::Map { gpa, source })?;
        Ok(MappedPage { page: Some(page), ioctls: Arc::clone(&self.ioctls), gpa })
    }
}

/// The path that [`Device::open_default`] opens.
pub fn default_path() -> PathBuf {
    std::env::var_os(PATH_VARIABLE).map_or_else(|| DEFAULT_PATH.into(), PathBuf::from)
}

/// A page of another virtual machine, mapped here until it is unmapped or dropped.
///
/// What it holds may change at any moment, so it is only ever copied: there is no slice of it.
#[derive(Debug)]
pub struct MappedPage {
    /// `None` once the mapping is undone or given up.
    page: Option<Page>,
    ioctls: Arc<Ioctls>,
    gpa: u64,
}

impl MappedPage {
    /// Guest-physical address in the target.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Address in this process.
    pub fn gva(&self) -> usize {
        self.page.as_ref().map_or(0, Page::address)
    }

    /// Copies `buf.len()` bytes from `offset` in the page on.
    ///
    /// # Errors
    /// [`PageError::Outside`].
    pub fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), PageError> {
        let len = buf.len();
        self.page(offset, len)?.read(offset, buf)
    }

    /// Copies `bytes` to `offset` in the page on; the target sees them at once.
    ///
    /// # Errors
    /// [`PageError::Outside`].
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), PageError> {
        self.page(offset, bytes.len())?.write(offset, bytes)
    }

    /// Reads the word at `offset`, a multiple of 8, in one access.
    ///
    /// # Errors
    /// [`PageError::Outside`], [`PageError::Unaligned`].
    pub fn read_u64(&self, offset: usize) -> Result<u64, PageError> {
        self.page(offset, 8)?.read_u64(offset)
    }

    /// Writes the word at `offset`, a multiple of 8, in one access.
    ///
    /// # Errors
    /// [`PageError::Outside`], [`PageError::Unaligned`].
    pub fn write_u64(&self, offset: usize, value: u64) -> Result<(), PageError> {
        self.page(offset, 8)?.write_u64(offset, value)
    }

    /// Undoes the mapping and returns the page: fresh memory of this process, all zeros.
    ///
    /// # Errors
    /// [`DeviceError::Unmap`]; the page's address is then never used again in this process.
    pub fn unmap(mut self) -> Result<Page, DeviceError> {
        match self.undo() {
            Some(result) => result,
            None => Page::new().map_err(DeviceError::Page),
        }
    }

    fn page(&self, offset: usize, len: usize) -> Result<&Page, PageError> {
        self.page.as_ref().ok_or(PageError::Outside { offset, len })
    }

    /// Undoes the mapping, the first time it is called.
    fn undo(&mut self) -> Option<Result<Page, DeviceError>> {
        let page = self.page.take()?;
        Some(match self.ioctls.unmap(&page) {
            Ok(()) => Ok(page),
            Err(source) => {
                let gva = page.address();
                // The driver still knows this address, and what lies there may still be the
                // target's: nothing else of this process may ever come to lie
                // there.
                page.leak();
                Err(DeviceError::Unmap { gpa: self.gpa, gva, source })
            }
        })
    }
}

impl Drop for MappedPage {
    fn drop(&mut self) {
        if let Some(Err(error)) = self.undo() {
            tracing::error!(%error, "a mapping stays: its address is not used again");
        }
    }
}
