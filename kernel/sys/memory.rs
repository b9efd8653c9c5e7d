// SPDX-License-Identifier: GPL-2.0-only
//! Guest-physical memory outside of RAM, mapped into the kernel. C header: `include/linux/io.h`.

use core::ffi::c_int;
use core::ptr::NonNull;

use kernel::bindings;
use kernel::prelude::*;
use kernel::sync::SetOnce;

use super::cpu;
use super::iter::{NoPageFaults, UserBuffer};
use super::lock::StaticMutex;
use crate::abi::ioctl::PAGE_SIZE;

/// Held while memory is mapped: a range that is mapped while another mapping of it is uncached gets
/// no other type.
static CACHING: StaticMutex<()> =
    StaticMutex::new(c"kvmmem_caching", || kernel::static_lock_class!());

/// Memory outside of this machine's RAM, mapped into the kernel. Another machine may change it at
/// any time: no reference to its bytes exists. User space gets the same memory type:
/// `vmf_insert_pfn` takes that of the mapping that has reserved the range, and uncached where none
/// has.
///
/// # Invariants
///
/// `address` is a mapping that `memremap` returned of the `len` bytes at `start`, whole pages that
/// are not System RAM.
pub(crate) struct Memory {
    address: NonNull<u8>,
    start: u64,
    len: usize,
    /// Whether large pages can be inserted for it.
    is_write_back: bool,
}

// SAFETY: the mapping belongs to no thread.
unsafe impl Send for Memory {}
// SAFETY: shared access is volatile or by the kernel's copies, which bear concurrent changes.
unsafe impl Sync for Memory {}

impl Memory {
    /// Whether there can be such memory: whole pages that the CPU can address and that are no RAM
    /// of this machine.
    pub(crate) fn is_possible(start: u64, len: u64) -> bool {
        let (ram, any) = (
            bindings::IORESOURCE_SYSTEM_RAM as usize,
            bindings::IORES_DESC_NONE as usize,
        );
        len > 0
            && (start | len) % PAGE_SIZE == 0
            && start
                .checked_add(len)
                .is_some_and(|end| end <= cpu::physical_end())
            // SAFETY: the function only looks through the resources; any range may be asked about.
            && unsafe { bindings::region_intersects(start, len as usize, ram, any) }
                == bindings::REGION_DISJOINT as c_int
    }

    /// Maps memory so that it is cached: write-back, or write-through where MTRRs prescribe
    /// uncached memory. `EINVAL` where there can be none, `EOPNOTSUPP` where it cannot be
    /// cached, `ENOMEM` where there is no room.
    pub(crate) fn map(start: u64, len: u64) -> Result<Self> {
        let _one = CACHING.lock();
        Self::map_cached(start, len)
    }

    /// The memory in `place`, mapped as [`Self::map`] does if it is not yet.
    pub(crate) fn map_once(place: &SetOnce<Self>, start: u64, len: u64) -> Result<&Self> {
        let _one = CACHING.lock();
        if place.as_ref().is_none() {
            place.populate(Self::map_cached(start, len)?);
        }
        // Only this function populates, and under the lock.
        place.as_ref().ok_or(ENOMEM)
    }

    /// The caller holds `CACHING`.
    fn map_cached(start: u64, len: u64) -> Result<Self> {
        for flags in [bindings::MEMREMAP_WB, bindings::MEMREMAP_WT] {
            let mut memory = Self::map_as(start, len, flags as usize)?;
            if let Some(is_write_back) = memory.caching() {
                memory.is_write_back = is_write_back;
                return Ok(memory);
            }
        }
        Err(EOPNOTSUPP)
    }

    /// Maps memory, cached or not. `EINVAL` where there can be none, `ENOMEM` where there is no
    /// room.
    pub(crate) fn map_any(start: u64, len: u64) -> Result<Self> {
        Self::map_as(start, len, bindings::MEMREMAP_WB as usize)
    }

    fn map_as(start: u64, len: u64, flags: usize) -> Result<Self> {
        if !Self::is_possible(start, len) {
            return Err(EINVAL);
        }
        let size = usize::try_from(len)?;
        // SAFETY: the range is whole pages that the CPU can address and is not RAM.
        let address = unsafe { bindings::memremap(start, size, flags) };
        let address = NonNull::new(address.cast()).ok_or(ENOMEM)?;
        // INVARIANT: just mapped, and checked to hold no RAM.
        Ok(Self {
            address,
            start,
            len: size,
            is_write_back: false,
        })
    }

    /// Whether the mapping is write-back or else write-through; `None` where it is neither.
    /// `memremap` does not say whether the type is the one that was asked for.
    fn caching(&self) -> Option<bool> {
        let mut level = 0;
        // SAFETY: by the invariant the address is mapped, and its tables stay while it is.
        let bits = unsafe {
            let entry = bindings::lookup_address(self.address.as_ptr() as usize, &mut level);
            if entry.is_null() {
                return None;
            }
            (*entry).pte
        };
        let pat = if level == bindings::pg_level_PG_LEVEL_4K {
            bindings::_PAGE_BIT_PAT
        } else {
            bindings::_PAGE_BIT_PAT_LARGE
        };
        let is_set = |bit: u32| bits >> bit & 1 != 0;
        // As Linux programs the page attribute table.
        match (
            is_set(pat),
            is_set(bindings::_PAGE_BIT_PCD),
            is_set(bindings::_PAGE_BIT_PWT),
        ) {
            (_, false, false) => Some(true),
            (true, true, true) => Some(false),
            _ => None,
        }
    }

    /// The first guest-physical address, of this machine.
    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    pub(crate) fn len(&self) -> u64 {
        self.len as u64
    }

    pub(super) fn is_write_back(&self) -> bool {
        self.is_write_back
    }

    /// The address of the `T` at `offset`; `None` outside of the memory or where it is not aligned.
    fn at<T>(&self, offset: usize) -> Option<*mut T> {
        let is_inside = offset
            .checked_add(size_of::<T>())
            .is_some_and(|end| end <= self.len);
        // SAFETY: within the mapping, by the type's invariant.
        (is_inside && offset % align_of::<T>() == 0)
            .then(|| unsafe { self.address.as_ptr().add(offset) }.cast())
    }

    /// The number at `offset`, a multiple of 8; 0 outside of the memory.
    pub(crate) fn read_u64(&self, offset: usize) -> u64 {
        self.at::<u64>(offset).map_or(0, |place| {
            // SAFETY: `at` returns an aligned address within the mapping; any bytes are a number.
            u64::from_le(unsafe { place.read_volatile() })
        })
    }

    /// Writes the number at `offset`, a multiple of 8; nothing outside of the memory.
    pub(crate) fn write_u64(&self, offset: usize, value: u64) {
        if let Some(place) = self.at::<u64>(offset) {
            // SAFETY: `at` returns an aligned address within the mapping, to whose bytes no
            // reference exists.
            unsafe { place.write_volatile(value.to_le()) };
        }
    }

    /// Writes the number at `offset`, a multiple of 4; nothing outside of the memory.
    pub(crate) fn write_u32(&self, offset: usize, value: u32) {
        if let Some(place) = self.at::<u32>(offset) {
            // SAFETY: `at` returns an aligned address within the mapping, to whose bytes no
            // reference exists.
            unsafe { place.write_volatile(value.to_le()) };
        }
    }

    /// Copies between `offset` and a process's buffer: short where the memory ends, or where the
    /// buffer has no page. `None` where `is_valid` says afterwards that these were not the right
    /// bytes: the buffer's position is where it was, though a destination may have been written to.
    pub(crate) fn copy(
        &self,
        offset: u64,
        len: usize,
        buffer: &mut impl UserBuffer,
        is_valid: impl FnOnce() -> bool,
    ) -> Option<usize> {
        let offset = usize::try_from(offset).ok()?;
        let len = len.min(self.len.checked_sub(offset)?);
        let no_faults = NoPageFaults::new();
        // SAFETY: `offset` and `len` are within the mapping, by the type's invariant, to whose
        // bytes no reference exists; the kernel's copies bear that the bytes change.
        let copied = unsafe { buffer.copy(self.address.as_ptr().add(offset), len) };
        drop(no_faults);
        if is_valid() {
            return Some(copied);
        }
        // SAFETY: the buffer has been advanced by so many bytes just now.
        unsafe { buffer.revert(copied) };
        None
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: by the invariant `memremap` returned it, and nothing uses it afterwards. Page
        // tables that still show the range lead to what is no RAM; and to no device that could have
        // gone, as a view zaps its pages before it drops a window, and a device waits for that.
        unsafe { bindings::memunmap(self.address.as_ptr().cast()) };
    }
}
