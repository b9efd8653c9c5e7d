// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads from the kernel's address space: bytes, numbers, texts.

use kvmmem_memory::PAGE_SIZE;

use super::error::KernelError;
use super::guest_kernel::Kernel;
use crate::space::Space;

/// Bytes of a text that are read at a time, up to the end of a page.
const TEXT_STEP: u64 = 256;

impl Kernel<'_> {
    /// Fills `buf` from `gva` on.
    ///
    /// # Errors
    /// [`KernelError::Read`].
    pub fn read(&self, gva: u64, buf: &mut [u8]) -> Result<(), KernelError> {
        self.space.read(gva, buf).map_err(|source| KernelError::read(gva, source))
    }

    /// The `N` bytes at `gva`.
    ///
    /// # Errors
    /// [`KernelError::Read`].
    pub fn read_array<const N: usize>(&self, gva: u64) -> Result<[u8; N], KernelError> {
        let mut bytes = [0; N];
        self.read(gva, &mut bytes)?;
        Ok(bytes)
    }

    /// The byte at `gva`.
    ///
    /// # Errors
    /// [`KernelError::Read`].
    pub fn read_u8(&self, gva: u64) -> Result<u8, KernelError> {
        self.read_array(gva).map(|[byte]| byte)
    }

    /// The number of 2 bytes at `gva`.
    ///
    /// # Errors
    /// [`KernelError::Read`].
    pub fn read_u16(&self, gva: u64) -> Result<u16, KernelError> {
        self.read_array(gva).map(u16::from_le_bytes)
    }

    /// The number of 4 bytes at `gva`.
    ///
    /// # Errors
    /// [`KernelError::Read`].
    pub fn read_u32(&self, gva: u64) -> Result<u32, KernelError> {
        self.read_array(gva).map(u32::from_le_bytes)
    }

    /// The number or pointer of 8 bytes at `gva`.
    ///
    /// # Errors
    /// [`KernelError::Read`].
    pub fn read_u64(&self, gva: u64) -> Result<u64, KernelError> {
        self.read_array(gva).map(u64::from_le_bytes)
    }

    /// The bytes from `gva` on up to the first 0, at most `max`.
    ///
    /// # Errors
    /// [`KernelError::Read`].
    pub fn read_cstr(&self, gva: u64, max: usize) -> Result<Vec<u8>, KernelError> {
        self.space.read_cstr(gva, max)
    }
}

impl Space<'_> {
    /// The bytes from `gva` on up to the first 0, at most `max`.
    ///
    /// # Errors
    /// [`KernelError::Read`].
    pub fn read_cstr(&self, gva: u64, max: usize) -> Result<Vec<u8>, KernelError> {
        let mut text = Vec::new();
        while text.len() < max {
            let at = gva.wrapping_add(text.len() as u64);
            // Up to the end of a step's place: what follows a text may not be mapped.
            let step =
                usize::try_from(TEXT_STEP - at % TEXT_STEP).unwrap_or(1).min(max - text.len());
            let start = text.len();
            text.resize(start + step, 0);
            let part = text.get_mut(start..).unwrap_or_default();
            self.read(at, part).map_err(|source| KernelError::read(at, source))?;
            if let Some(end) = memchr::memchr(0, part) {
                text.truncate(start + end);
                break;
            }
        }
        Ok(text)
    }

    /// The bytes from `gva` on, at most `most`, up to the first page that is not in memory.
    pub fn read_some(&self, gva: u64, most: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < most {
            let done = bytes.len();
            let Some(at) = gva.checked_add(done as u64) else { break };
            let in_page = PAGE_SIZE as u64 - at % PAGE_SIZE as u64;
            let step = usize::try_from(in_page.min(most - done as u64)).unwrap_or(1);
            bytes.resize(done + step, 0);
            if self.read(at, bytes.get_mut(done..).unwrap_or_default()).is_err() {
                bytes.truncate(done);
                break;
            }
        }
        bytes
    }
}
