// SPDX-License-Identifier: Apache-2.0 OR MIT
//! v1 on `/dev/kvmmem`: single pages of another virtual machine in this process.
//!
//! Tools that speak KVMI map pages with it, one token a page; [`crate::View`] is the later
//! interface. It mirrors the two ioctls in [`kvmmem_abi::ioctl`].

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
    /// MAP failed; the token was most likely used.
    #[error("cannot map the target's page at gpa {gpa:#x}: {}", explain::map(*.source))]
    Map {
        /// Guest-physical address in the target.
        gpa: u64,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// UNMAP failed; this process never uses the page's address again.
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
    /// The errno if a system call failed.
    ///
    /// ```
    /// use kvmmem::Device;
    ///
    /// let error = Device::open("/nonexistent").unwrap_err();
    /// assert_eq!(error.errno(), Some(2)); // ENOENT
    /// ```
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

/// The open device. Clones share one open file, which is closed with the last clone and the last
/// page.
///
/// It serves only the process that opened it: after a fork, the child opens its own.
#[derive(Clone, Debug)]
pub struct Device {
    ioctls: Arc<Ioctls>,
}

impl Device {
    /// Opens the device at `path`.
    ///
    /// ```no_run
    /// let device = kvmmem::Device::open("/dev/kvmmem")?;
    /// # Ok::<(), kvmmem::DeviceError>(())
    /// ```
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
    /// ```no_run
    /// let device = kvmmem::Device::open_default()?;
    /// # Ok::<(), kvmmem::DeviceError>(())
    /// ```
    ///
    /// # Errors
    /// As [`Device::open`].
    pub fn open_default() -> Result<Self, DeviceError> {
        Self::open(default_path())
    }

    /// Maps the page at `gpa`, a multiple of 4096, of the virtual machine that `token` names,
    /// readable and writable.
    ///
    /// This uses the token, also in most failures: ask for another one to try again.
    ///
    /// ```no_run
    /// # fn example(device: &kvmmem::Device, token: kvmmem::Token) -> Result<(), kvmmem::DeviceError> {
    /// let page = device.map(token, 0x10_0000)?;
    /// println!("mapped at {:#x}", page.gva());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`DeviceError::Map`] if the driver or the host refuses, [`DeviceError::Page`] if memory runs
    /// out.
    pub fn map(&self, token: Token, gpa: u64) -> Result<MappedPage, DeviceError> {
        let page = Page::new().map_err(DeviceError::Page)?;
        let words = MapMemToken { token: token.words() };
        self.ioctls.map(words, gpa, &page).map_err(|source| DeviceError::Map { gpa, source })?;
        Ok(MappedPage { page: Some(page), ioctls: Arc::clone(&self.ioctls), gpa })
    }
}

/// The path that [`Device::open_default`] opens.
///
/// ```
/// println!("{}", kvmmem::device::default_path().display());
/// ```
pub fn default_path() -> PathBuf {
    std::env::var_os(PATH_VARIABLE).map_or_else(|| DEFAULT_PATH.into(), PathBuf::from)
}

/// A page of another virtual machine, mapped here until it is unmapped or dropped.
///
/// The contents may change at any moment, so they are copied: there is no slice of them.
#[derive(Debug)]
pub struct MappedPage {
    /// `None` once the mapping is undone or given up.
    page: Option<Page>,
    ioctls: Arc<Ioctls>,
    gpa: u64,
}

impl MappedPage {
    /// Guest-physical address in the target.
    ///
    /// ```no_run
    /// # fn example(page: kvmmem::MappedPage) -> Result<(), kvmmem::PageError> {
    /// println!("{:#x}", page.gpa());
    /// # Ok(())
    /// # }
    /// ```
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Address in this process.
    ///
    /// ```no_run
    /// # fn example(page: kvmmem::MappedPage) -> Result<(), kvmmem::PageError> {
    /// println!("{:#x}", page.gva());
    /// # Ok(())
    /// # }
    /// ```
    pub fn gva(&self) -> usize {
        self.page.as_ref().map_or(0, Page::address)
    }

    /// Copies the bytes at `offset` in the page into `buf`.
    ///
    /// ```no_run
    /// # fn example(page: kvmmem::MappedPage) -> Result<(), kvmmem::PageError> {
    /// let mut bytes = [0; 64];
    /// page.read(0x100, &mut bytes)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`PageError::Outside`].
    pub fn read(&self, offset: usize, buf: &mut [u8]) -> Result<(), PageError> {
        let len = buf.len();
        self.page(offset, len)?.read(offset, buf)
    }

    /// Copies `bytes` to `offset` in the page; the target sees them at once.
    ///
    /// ```no_run
    /// # fn example(page: kvmmem::MappedPage) -> Result<(), kvmmem::PageError> {
    /// page.write(0x100, b"patched")?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`PageError::Outside`].
    pub fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), PageError> {
        self.page(offset, bytes.len())?.write(offset, bytes)
    }

    /// Reads the word at `offset`, a multiple of 8, in one access.
    ///
    /// ```no_run
    /// # fn example(page: kvmmem::MappedPage) -> Result<(), kvmmem::PageError> {
    /// println!("{:#x}", page.read_u64(0x18)?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`PageError::Outside`], [`PageError::Unaligned`].
    pub fn read_u64(&self, offset: usize) -> Result<u64, PageError> {
        self.page(offset, 8)?.read_u64(offset)
    }

    /// Writes the word at `offset`, a multiple of 8, in one access.
    ///
    /// ```no_run
    /// # fn example(page: kvmmem::MappedPage) -> Result<(), kvmmem::PageError> {
    /// page.write_u64(0x18, 1)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`PageError::Outside`], [`PageError::Unaligned`].
    pub fn write_u64(&self, offset: usize, value: u64) -> Result<(), PageError> {
        self.page(offset, 8)?.write_u64(offset, value)
    }

    /// Undoes the mapping and returns the page: zeroed memory of this process.
    ///
    /// ```no_run
    /// # fn example(page: kvmmem::MappedPage) -> Result<(), kvmmem::DeviceError> {
    /// let fresh = page.unmap()?;
    /// assert_eq!(fresh.read_u64(0).ok(), Some(0));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`DeviceError::Unmap`]; this process never uses the page's address again.
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
                // The driver still knows this address, and the page there may still be the
                // target's: this process must never use the address again.
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
