// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Guest RAM: one sparse memfd, mapped into the VMM, whose offsets are GPAs. Any page can be
//! replaced with a page of another file while the guest runs.
//!
//! The replacement is one `mmap(MAP_FIXED | MAP_SHARED)`; KVM follows it by its MMU notifier
//! (`KVM_CAP_SYNC_MMU`, Documentation/virt/kvm/api.rst), so that the guest's next access sees the
//! new page.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise};
use vm_memory::mmap::MmapRegionError;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion,
    GuestRegionMmap,
};

use crate::huge::page_size;
use crate::map_over::map_over;

/// Size of a page in bytes.
pub const PAGE_SIZE: u64 = kvmmem_abi::ioctl::PAGE_SIZE;

/// [`PAGE_SIZE`] as a length in this process.
const PAGE_BYTES: usize = 4096;
const _: () = assert!(PAGE_BYTES as u64 == PAGE_SIZE);

/// First GPA of the hole that is left for devices (3 GiB).
pub const HOLE_START: u64 = 3 << 30;

/// First GPA behind the hole (4 GiB).
pub const HOLE_END: u64 = 4 << 30;

/// What can go wrong with guest RAM.
#[derive(Debug, thiserror::Error)]
pub enum RamError {
    /// The size is zero or no multiple of the page size, or too large to address.
    #[error(
        "a RAM size of {bytes:#x} bytes is not a positive multiple of the page size within 64 TiB"
    )]
    Size {
        /// The size asked for.
        bytes: u64,
    },
    /// The memfd could not be made, sized or sealed.
    #[error("cannot make a memory file of {bytes:#x} bytes for guest RAM")]
    Create {
        /// Length of the file.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
    /// The file could not be mapped.
    #[error("cannot map guest RAM at GPA {gpa:#x}")]
    Map {
        /// First GPA of the region.
        gpa: u64,
        /// Why.
        source: MmapRegionError,
    },
    /// The regions do not fit the address space.
    #[error("cannot lay out guest RAM")]
    Layout,
    /// KVM refused a memory slot.
    #[error("cannot give KVM the memory slot at GPA {gpa:#x}")]
    Attach {
        /// First GPA of the region.
        gpa: u64,
        /// Why.
        source: io::Error,
    },
    /// The GPA is not the start of a page of RAM.
    #[error("GPA {gpa:#x} is not the start of a page of RAM")]
    NoPage {
        /// The GPA asked for.
        gpa: u64,
    },
    /// The file has huge pages alone, of which one would replace many of the guest's.
    #[error(
        "GPA {gpa:#x} cannot be a page of a file of huge pages ({page:#x} bytes each); attach a view instead"
    )]
    HugePages {
        /// The page's GPA.
        gpa: u64,
        /// Length of the file's pages, bytes.
        page: u64,
    },
    /// A page could not be replaced or restored.
    #[error("cannot replace the page at GPA {gpa:#x}")]
    Replace {
        /// The page's GPA.
        gpa: u64,
        /// Why.
        source: io::Error,
    },
    /// What a replaced page holds could not be written into the machine's own page.
    #[error("cannot keep what the page at GPA {gpa:#x} shows")]
    Keep {
        /// The page's GPA.
        gpa: u64,
        /// Why.
        source: io::Error,
    },
    /// A page's memory could not be given back to the host.
    #[error("cannot punch {bytes:#x} bytes at GPA {gpa:#x} out of guest RAM")]
    Punch {
        /// The first page's GPA.
        gpa: u64,
        /// How many bytes.
        bytes: u64,
        /// Why.
        source: io::Error,
    },
}

/// One region of RAM: `len` bytes from `gpa`, at the same offset in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RamRegion {
    /// First GPA.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
}

/// The regions of a machine with `bytes` of RAM: up to [`HOLE_START`], and what is left from
/// [`HOLE_END`].
pub fn layout(bytes: u64) -> Vec<RamRegion> {
    let low = bytes.min(HOLE_START);
    let mut regions = vec![RamRegion { gpa: 0, len: low }];
    if bytes > low {
        regions.push(RamRegion { gpa: HOLE_END, len: bytes - low });
    }
    regions
}

/// A machine's RAM.
///
/// # Invariants
///
/// Every region of `memory` is a live shared mapping of `file` at the offset that equals its GPA,
/// except for pages that [`GuestRam::replace_page`] mapped over it; the mapping is unmapped only
/// when the last clone of the region is dropped.
#[derive(Debug)]
pub struct GuestRam {
    file: File,
    memory: GuestMemoryMmap,
    /// Set once the mapping is kept for the rest of the process.
    kept: OnceLock<()>,
}

impl GuestRam {
    /// Makes RAM of `bytes` bytes, all zero, none of it allocated yet.
    ///
    /// The file is sealed: it cannot shrink, grow or get further seals (a seal against writing
    /// would keep [`GuestRam::restore_page`] from mapping it again). Holes can still be
    /// punched.
    ///
    /// # Errors
    /// [`RamError::Size`], [`RamError::Create`], [`RamError::Map`].
    pub fn new(bytes: u64) -> Result<Self, RamError> {
        const MAX_BYTES: u64 = 64 << 40;
        if bytes == 0 || !bytes.is_multiple_of(PAGE_SIZE) || bytes > MAX_BYTES {
            return Err(RamError::Size { bytes });
        }
        let regions = layout(bytes);
        let end = regions.last().map_or(0, |region| region.gpa + region.len);
        let create =
            |source: rustix::io::Errno| RamError::Create { bytes: end, source: source.into() };
        let fd =
            rustix::fs::memfd_create("kvmmem-ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)
                .map_err(create)?;
        rustix::fs::ftruncate(&fd, end).map_err(create)?;
        rustix::fs::fcntl_add_seals(&fd, SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL)
            .map_err(create)?;
        let file = File::from(fd);

        let mut mapped = Vec::with_capacity(regions.len());
        for RamRegion { gpa, len } in regions {
            let len = usize::try_from(len).map_err(|_| RamError::Size { bytes })?;
            let copy =
                file.try_clone().map_err(|source| RamError::Create { bytes: end, source })?;
            let region = GuestRegionMmap::from_range(
                GuestAddress(gpa),
                len,
                Some(FileOffset::new(copy, gpa)),
            );
            mapped.push(region.map_err(|error| match error {
                vm_memory::mmap::FromRangesError::MmapRegion(source) => {
                    RamError::Map { gpa, source }
                }
                _ => RamError::Layout,
            })?);
        }
        let memory = GuestMemoryMmap::from_regions(mapped).map_err(|_| RamError::Layout)?;
        let ram = Self { file, memory, kept: OnceLock::new() };
        for region in ram.memory.iter() {
            if let Ok(len) = usize::try_from(region.len()) {
                advise(region.as_ptr(), len);
            }
        }
        Ok(ram)
    }

    /// The mapped regions, for copying and volatile access.
    pub fn memory(&self) -> &GuestMemoryMmap {
        &self.memory
    }

    /// The memfd.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// The regions, by rising GPA.
    pub fn regions(&self) -> Vec<RamRegion> {
        self.memory
            .iter()
            .map(|region| RamRegion { gpa: region.start_addr().0, len: region.len() })
            .collect()
    }

    /// Whether `gpa` is the start of a page of RAM.
    pub fn is_page(&self, gpa: u64) -> bool {
        gpa.is_multiple_of(PAGE_SIZE) && self.memory.find_region(GuestAddress(gpa)).is_some()
    }

    /// Makes RAM the memory slots of `vm`, from slot 0 on.
    ///
    /// # Errors
    /// [`RamError::Attach`].
    pub fn attach(&self, vm: &VmFd) -> Result<(), RamError> {
        // The guest can reach the mapping as long as any descriptor of the VM or of its vCPUs is
        // open, which cannot be followed from here: so the mapping stays for the rest of
        // the process. A VMM has one RAM.
        self.kept.get_or_init(|| std::mem::forget(self.memory.clone()));
        for (slot, region) in (0u32..).zip(self.memory.iter()) {
            let gpa = region.start_addr().0;
            let slot = kvm_userspace_memory_region {
                slot,
                flags: 0,
                guest_phys_addr: gpa,
                memory_size: region.len(),
                userspace_addr: region.as_ptr().addr() as u64,
            };
            // SAFETY: by the invariant, userspace_addr and memory_size describe a live shared
            // mapping, and the clone forgotten above keeps it mapped for the rest of
            // the process, so the guest never reaches anything else. No reference to
            // that memory exists: GuestMemoryMmap offers copies and volatile access alone.
            unsafe { vm.set_user_memory_region(slot) }
                .map_err(|error| RamError::Attach { gpa, source: error.into() })?;
        }
        Ok(())
    }

    /// Maps the page at `offset` of `fd` in the place of the page at `gpa`, shared and writable.
    ///
    /// The file must not shrink while the page is mapped: a page beyond its end kills the VMM by
    /// SIGBUS.
    ///
    /// # Errors
    /// [`RamError::NoPage`]; [`RamError::HugePages`], [`RamError::Replace`], and the page is as it
    /// was.
    pub fn replace_page(&self, gpa: u64, fd: BorrowedFd<'_>, offset: u64) -> Result<(), RamError> {
        check_pages(gpa, fd)?;
        let address = self.page(gpa)?;
        // SAFETY: as in `page`: `address` is that of a page of RAM, and the file's pages are no
        // larger, as checked above. No reference to that memory exists (see `attach`), so no one
        // relies on its contents staying the same.
        let mapped = unsafe {
            map_over(
                address.cast(),
                PAGE_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                (fd, offset),
                (self.fd(), gpa),
            )
        };
        mapped.map_err(|source| RamError::Replace { gpa, source: source.into() })?;
        advise(address, PAGE_BYTES);
        Ok(())
    }

    /// Address of the page at `gpa`: it lies within a live mapping that its region owns.
    fn page(&self, gpa: u64) -> Result<*mut u8, RamError> {
        let region = self.memory.find_region(GuestAddress(gpa)).ok_or(RamError::NoPage { gpa })?;
        if !gpa.is_multiple_of(PAGE_SIZE) {
            return Err(RamError::NoPage { gpa });
        }
        let within =
            usize::try_from(gpa - region.start_addr().0).map_err(|_| RamError::NoPage { gpa })?;
        Ok(region.as_ptr().wrapping_add(within))
    }

    /// Maps the machine's own page at `gpa` back. It needs no mapping more than there are: what ends
    /// a view or a grant must not fail for want of them.
    ///
    /// # Errors
    /// As [`GuestRam::replace_page`].
    pub fn restore_page(&self, gpa: u64) -> Result<(), RamError> {
        check_pages(gpa, self.fd())?;
        let address = self.page(gpa)?;
        // SAFETY:
        // 1. As in `page`, the page at `address` lies within a live mapping that its region owns,
        //    and the own file's pages are as small, as checked: MAP_FIXED replaces nothing else. A memfd
        //    refuses no mapping that it has had before.
        // 2. No reference to that memory exists (see `attach`), so no one relies on its contents
        //    staying the same.
        let mapped = unsafe {
            rustix::mm::mmap(
                address.cast(),
                PAGE_BYTES,
                ProtFlags::READ | ProtFlags::WRITE,
                MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE,
                self.fd(),
                gpa,
            )
        };
        mapped.map_err(|source| RamError::Replace { gpa, source: source.into() })?;
        // Mappings that are alike become one.
        advise(address, PAGE_BYTES);
        Ok(())
    }

    /// As [`GuestRam::restore_page`], with what the replaced page holds now. What is written into
    /// it meanwhile is lost.
    ///
    /// # Errors
    /// As [`GuestRam::replace_page`], and [`RamError::Keep`]; the page stays replaced.
    pub fn keep_page(&self, gpa: u64) -> Result<(), RamError> {
        let mut content = [0; PAGE_BYTES];
        if !self.is_page(gpa) {
            return Err(RamError::NoPage { gpa });
        }
        self.memory
            .read_slice(&mut content, GuestAddress(gpa))
            .map_err(|_| RamError::NoPage { gpa })?;
        self.file.write_all_at(&content, gpa).map_err(|source| RamError::Keep { gpa, source })?;
        self.restore_page(gpa)
    }

    /// Gives the memory of the machine's own page at `gpa` back to the host; it reads as zero from
    /// then on.
    ///
    /// # Errors
    /// [`RamError::NoPage`], [`RamError::Punch`].
    pub fn punch_page(&self, gpa: u64) -> Result<(), RamError> {
        if !self.is_page(gpa) {
            return Err(RamError::NoPage { gpa });
        }
        self.punch(gpa, PAGE_SIZE)
    }

    /// Zeroes all of the machine's own RAM by giving it back to the host.
    ///
    /// # Errors
    /// [`RamError::Punch`].
    pub fn zero(&self) -> Result<(), RamError> {
        self.regions().into_iter().try_for_each(|region| self.punch(region.gpa, region.len))
    }

    fn punch(&self, gpa: u64, bytes: u64) -> Result<(), RamError> {
        rustix::fs::fallocate(
            &self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            gpa,
            bytes,
        )
        .map_err(|source| RamError::Punch { gpa, bytes, source: source.into() })
    }
}

/// Refuses a file of huge pages: the kernel would map and unmap more than one small one.
fn check_pages(gpa: u64, file: BorrowedFd<'_>) -> Result<(), RamError> {
    let page =
        page_size(file).map_err(|source| RamError::Replace { gpa, source: source.into() })?;
    if page == PAGE_SIZE { Ok(()) } else { Err(RamError::HugePages { gpa, page }) }
}

/// Asks for transparent huge pages, which spare most of the guest's second-level faults and shorten
/// the walks, and for no copy of a guest's memory in this process's core dump. The former are the
/// host's choice (`transparent_hugepage/shmem_enabled`), and a machine without the latter runs as
/// well, so refusals are no errors.
///
/// `start` and `len` are of a mapping of guest RAM: a whole region, or one page of it.
fn advise(start: *mut u8, len: usize) {
    for advice in [Advice::LinuxHugepage, Advice::LinuxDontDump] {
        // SAFETY: neither advice changes what memory holds or which addresses are mapped, for
        // any range, so nothing that relies on either is affected.
        let _ = unsafe { madvise(start.cast(), len, advice) };
    }
}

#[cfg(test)]
mod tests;
