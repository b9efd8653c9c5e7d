// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Loads the kernel and the initial RAM disk (Documentation/arch/x86/boot.rst).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::layout::{CMDLINE, HIGH_MEMORY, LOW_MEMORY_END};
use crate::config::VmConfig;

/// Why a machine's kernel could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file could not be opened or read.
    #[error("cannot read {what} {path:?}")]
    Read {
        /// "kernel" or "initrd".
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The kernel is neither a bzImage nor an ELF file.
    #[error("kernel {path:?} is neither a bzImage nor a 64-bit ELF image for x86-64")]
    Format {
        /// The file.
        path: PathBuf,
    },
    /// The bzImage is too old or has no 64-bit entry point.
    #[error("kernel {path:?} has no 64-bit entry point (boot protocol {version:#x})")]
    NoLongModeEntry {
        /// The file.
        path: PathBuf,
        /// Its boot protocol.
        version: u16,
    },
    /// The loader refused the image: broken, cut short, or larger than RAM.
    #[error("kernel {path:?} cannot be loaded into {ram:#x} bytes of RAM")]
    Load {
        /// The file.
        path: PathBuf,
        /// Bytes of RAM below the PCI hole.
        ram: u64,
        /// Why.
        source: linux_loader::loader::Error,
    },
    /// Kernel and initrd need more RAM than there is.
    #[error("{path:?} needs {needed:#x} bytes of RAM, there are {ram:#x} below the PCI hole")]
    TooLittleMemory {
        /// The file that does not fit.
        path: PathBuf,
        /// How much RAM it takes to hold it and what lies below it.
        needed: u64,
        /// Bytes of RAM below the PCI hole.
        ram: u64,
    },
    /// The command line is too long or has a zero byte.
    #[error("the kernel command line of {length} bytes is longer than {limit} or has a zero byte")]
    Cmdline {
        /// Its length.
        length: usize,
        /// The most the kernel takes.
        limit: usize,
    },
}

/// A kernel in guest memory, ready to be started.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct LoadedKernel {
    /// Where the boot CPU starts.
    pub(crate) entry: u64,
    /// The image's setup header; all zero for an ELF image.
    pub(crate) header: setup_header,
    /// Place and size of the initrd.
    pub(crate) initrd: Option<(u64, u32)>,
    /// Length of the command line, which is at [`CMDLINE`].
    pub(crate) cmdline_len: u32,
}

/// Loads kernel, initrd and command line of `config` into `memory`.
pub(crate) fn load(config: &VmConfig, memory: &GuestMemoryMmap) -> Result<LoadedKernel, LoadError> {
    let ram = memory.find_region(GuestAddress(0)).map_or(0, GuestMemoryRegion::len);
    let path = &config.kernel;
    let read_error = |source| LoadError::Read { what: "kernel", path: path.clone(), source };
    let mut file = File::open(path).map_err(read_error)?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => LoadError::Format { path: path.clone() },
        _ => read_error(error),
    })?;
    let (mut kernel, end) = if magic == *b"\x7fELF" {
        load_elf(path, &mut file, memory, ram)?
    } else {
        load_bzimage(path, &mut file, memory, ram)?
    };
    if let Some(path) = &config.initrd {
        kernel.initrd = Some(load_initrd(path, end, kernel.header.initrd_addr_max, memory, ram)?);
    }
    kernel.cmdline_len = write_cmdline(&config.cmdline, kernel.header.cmdline_size, memory)?;
    Ok(kernel)
}

/// Returns the kernel and the GPA behind everything it needs to start.
fn load_elf(
    path: &Path,
    file: &mut File,
    memory: &GuestMemoryMmap,
    ram: u64,
) -> Result<(LoadedKernel, u64), LoadError> {
    const CLASS_64: u8 = 2;
    const MACHINE_X86_64: u16 = 62;
    let mut header = [0; 20];
    file.rewind()
        .and_then(|()| file.read_exact(&mut header))
        .map_err(|_| LoadError::Format { path: path.to_owned() })?;
    if header[4] != CLASS_64 || u16::from_le_bytes([header[18], header[19]]) != MACHINE_X86_64 {
        return Err(LoadError::Format { path: path.to_owned() });
    }
    let loaded = Elf::load(memory, None, file, Some(HIGH_MEMORY))
        .map_err(|source| LoadError::Load { path: path.to_owned(), ram, source })?;
    let entry = loaded.kernel_load.0;
    if entry >= ram {
        return Err(LoadError::TooLittleMemory { path: path.to_owned(), needed: entry, ram });
    }
    Ok((LoadedKernel { entry, ..Default::default() }, loaded.kernel_end))
}

/// Returns the kernel and the GPA behind everything it needs to start.
fn load_bzimage(
    path: &Path,
    file: &mut File,
    memory: &GuestMemoryMmap,
    ram: u64,
) -> Result<(LoadedKernel, u64), LoadError> {
    /// XLF_KERNEL_64: the image can be entered in 64-bit mode, 0x200 bytes behind its start.
    const LONG_MODE_ENTRY: u16 = 1;
    const LONG_MODE_OFFSET: u64 = 0x200;
    /// The first boot protocol with `xloadflags`.
    const PROTOCOL_2_12: u16 = 0x020c;
    use linux_loader::loader::Error as LoaderError;
    use linux_loader::loader::bzimage::Error as ImageError;

    let loaded =
        BzImage::load(memory, Some(HIGH_MEMORY), file, Some(HIGH_MEMORY)).map_err(|source| {
            match source {
                LoaderError::Bzimage(
                    ImageError::InvalidBzImage
                    | ImageError::ReadBzImageHeader
                    | ImageError::Underflow,
                ) => LoadError::Format { path: path.to_owned() },
                source => LoadError::Load { path: path.to_owned(), ram, source },
            }
        })?;
    let header = loaded.setup_header.unwrap_or_default();
    let (version, flags) = (header.version, header.xloadflags);
    if version < PROTOCOL_2_12 || flags & LONG_MODE_ENTRY == 0 {
        return Err(LoadError::NoLongModeEntry { path: path.to_owned(), version });
    }
    // The image unpacks itself to its preferred address and works within init_size bytes from
    // there.
    let end =
        header.pref_address.saturating_add(u64::from(header.init_size)).max(loaded.kernel_end);
    if end > ram {
        return Err(LoadError::TooLittleMemory { path: path.to_owned(), needed: end, ram });
    }
    Ok((
        LoadedKernel { entry: HIGH_MEMORY.0 + LONG_MODE_OFFSET, header, ..Default::default() },
        end,
    ))
}

/// Puts the initrd as high as the kernel takes it, but above `floor`.
fn load_initrd(
    path: &Path,
    floor: u64,
    highest: u32,
    memory: &GuestMemoryMmap,
    ram: u64,
) -> Result<(u64, u32), LoadError> {
    /// What kernels without a header of their own take (boot.rst, `initrd_addr_max`).
    const DEFAULT_HIGHEST: u32 = 0x37ff_ffff;
    let read_error = |source| LoadError::Read { what: "initrd", path: path.to_owned(), source };
    let mut file = File::open(path).map_err(read_error)?;
    let length = file.seek(SeekFrom::End(0)).map_err(read_error)?;
    file.rewind().map_err(read_error)?;
    let highest = if highest == 0 { DEFAULT_HIGHEST } else { highest };
    let top = ram.min(u64::from(highest) + 1);
    let needed = floor.saturating_add(length).saturating_add(0xfff);
    let too_little = || LoadError::TooLittleMemory { path: path.to_owned(), needed, ram };
    let start = top.checked_sub(length).ok_or_else(too_little)? & !0xfff;
    let (Ok(size), Ok(count), true) =
        (u32::try_from(length), usize::try_from(length), start >= floor)
    else {
        return Err(too_little());
    };
    memory
        .read_exact_volatile_from(GuestAddress(start), &mut file, count)
        .map_err(|error| read_error(io::Error::other(error)))?;
    Ok((start, size))
}

fn write_cmdline(cmdline: &str, limit: u32, memory: &GuestMemoryMmap) -> Result<u32, LoadError> {
    /// What kernels without a header of their own take: COMMAND_LINE_SIZE of x86, less the zero.
    const DEFAULT_LIMIT: u32 = 2047;
    /// What there is between the command line's place and the end of low memory.
    const ROOM: u64 = LOW_MEMORY_END - CMDLINE.0 - 1;
    let limit = if limit == 0 { DEFAULT_LIMIT } else { limit };
    let limit = usize::try_from(ROOM.min(limit.into())).unwrap_or(0);
    let refused = || LoadError::Cmdline { length: cmdline.len(), limit };
    if cmdline.len() > limit || cmdline.contains('\0') {
        return Err(refused());
    }
    let mut bytes = cmdline.as_bytes().to_vec();
    bytes.push(0);
    memory.write_slice(&bytes, CMDLINE).map_err(|_| refused())?;
    u32::try_from(cmdline.len()).map_err(|_| refused())
}

#[cfg(test)]
#[path = "loader_tests.rs"]
mod tests;
