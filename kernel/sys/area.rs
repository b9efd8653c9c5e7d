// SPDX-License-Identifier: GPL-2.0-only
//! Areas of a process's memory that a device fills by faults. C header: `include/linux/mm.h`.

use core::ffi::c_void;
use core::marker::PhantomData;
use core::ops::Deref;

use kernel::bindings;
use kernel::miscdevice::MiscDevice;
use kernel::mm::virt::{flags, VmaNew, VmaRef};
use kernel::prelude::*;
use kernel::types::ForeignOwnable;

use super::memory::Memory;
use crate::abi::ioctl::PAGE_SIZE;

/// What the areas of an open file call.
pub(crate) trait Areas: MiscDevice<Ptr = KBox<Self>> {
    /// A part or a copy of an area came to be.
    fn area_opened(&self, area: &VmaRef);

    /// An area or a part of one is gone.
    fn area_closed(&self, area: &VmaRef);

    /// Maps one page, of any size.
    fn fault(&self, fault: &Fault) -> Result<FaultResult, FaultError>;
}

/// An area that is being set up.
///
/// # Invariants
///
/// Its file is open and has a `T` as its private data, and no other thread uses the area.
pub(crate) struct NewArea<'a, T> {
    area: &'a VmaNew,
    _file: PhantomData<T>,
}

impl<'a, T: Areas> NewArea<'a, T> {
    /// # Safety
    ///
    /// The area must be one that is being set up for an open file whose private data is a `T`.
    pub(super) unsafe fn new(area: &'a VmaNew) -> Self {
        // INVARIANT: by the function's contract.
        Self {
            area,
            _file: PhantomData,
        }
    }

    /// Lets the pages come by faults; `number` comes back with each of them. `EINVAL` for a private
    /// area.
    pub(crate) fn fill_by_faults(&self, number: usize) -> Result {
        if self.flags() & flags::MAYSHARE == 0 {
            return Err(EINVAL);
        }
        self.set_dontexpand();
        self.set_dontdump();
        let vma = self.as_ptr();
        // SAFETY: by the type's invariant no other thread uses the area, and the functions of
        // `operations` find a `T` at its file. VM_PFNMAP is valid for it: it is not private, and
        // gets its pages from `vmf_insert_pfn` and the like only.
        unsafe {
            (*vma).__bindgen_anon_2.vm_flags |= flags::PFNMAP;
            (*vma).vm_ops = Self::OPERATIONS;
            (*vma).vm_private_data = number as *mut c_void;
        }
        Ok(())
    }

    const OPERATIONS: &'static bindings::vm_operations_struct = &bindings::vm_operations_struct {
        open: Some(open::<T>),
        close: Some(close::<T>),
        fault: Some(fault::<T>),
        huge_fault: Some(huge_fault::<T>),
        ..pin_init::zeroed()
    };
}

impl<T> Deref for NewArea<'_, T> {
    type Target = VmaNew;

    fn deref(&self) -> &VmaNew {
        self.area
    }
}

/// The offset in its file that an area begins with; `None` beyond all offsets.
pub(crate) fn file_offset(area: &VmaRef) -> Option<u64> {
    // SAFETY: a `VmaRef` exists only while the area is locked at least for reading.
    let pgoff = unsafe { (*area.as_ptr()).vm_pgoff };
    PAGE_SIZE.checked_mul(pgoff as u64)
}

/// The private data of the file whose area this is.
///
/// # Safety
///
/// [`NewArea::<T>::fill_by_faults`] has set the area up, and it is valid and locked.
unsafe fn file_of<'a, T: Areas>(vma: *mut bindings::vm_area_struct) -> &'a T {
    // SAFETY: by the function's contract the area keeps a file open whose private data is a `T`.
    unsafe { KBox::<T>::borrow((*(*vma).vm_file).private_data) }
}

/// # Safety
///
/// As that of [`file_of`].
unsafe extern "C" fn open<T: Areas>(vma: *mut bindings::vm_area_struct) {
    // SAFETY: by the function's contract, which is that of `file_of` too.
    let (file, area) = unsafe { (file_of::<T>(vma), VmaRef::from_raw(vma)) };
    file.area_opened(area);
}

/// # Safety
///
/// As that of [`file_of`].
unsafe extern "C" fn close<T: Areas>(vma: *mut bindings::vm_area_struct) {
    // SAFETY: by the function's contract, which is that of `file_of` too.
    let (file, area) = unsafe { (file_of::<T>(vma), VmaRef::from_raw(vma)) };
    file.area_closed(area);
}

/// # Safety
///
/// As that of [`file_of`], for the area of the fault, which is being handled.
unsafe extern "C" fn fault<T: Areas>(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: by the function's contract, which is that of `huge_fault` too; order 0 is a small
    // page.
    unsafe { huge_fault::<T>(vmf, 0) }
}

/// # Safety
///
/// As that of [`file_of`], for the area of the fault, which is being handled.
unsafe extern "C" fn huge_fault<T: Areas>(
    vmf: *mut bindings::vm_fault,
    order: u32,
) -> bindings::vm_fault_t {
    // SAFETY: by the function's contract the fault's area is set up and locked.
    let file = unsafe { file_of::<T>((*vmf).__bindgen_anon_1.vma) };
    // INVARIANT: by the function's contract, for the time of this call.
    let code = match file.fault(&Fault { vmf, order }) {
        Ok(FaultResult(code)) => return code,
        Err(FaultError::Bus) => bindings::vm_fault_reason_VM_FAULT_SIGBUS,
        Err(FaultError::Smaller) => bindings::vm_fault_reason_VM_FAULT_FALLBACK,
        Err(FaultError::Memory) => bindings::vm_fault_reason_VM_FAULT_OOM,
    };
    code as bindings::vm_fault_t
}

/// A page that a process needs.
///
/// # Invariants
///
/// `vmf` is a fault being handled, in an area that [`NewArea::fill_by_faults`] set up.
pub(crate) struct Fault {
    vmf: *mut bindings::vm_fault,
    order: u32,
}

/// A fault that was served.
pub(crate) struct FaultResult(bindings::vm_fault_t);

/// A fault that was not.
pub(crate) enum FaultError {
    /// There is no such memory: SIGBUS.
    Bus,
    /// Not with a page of this size.
    Smaller,
    /// This machine has no memory for it now: the access is tried again.
    Memory,
}

impl Fault {
    fn area(&self) -> *mut bindings::vm_area_struct {
        // SAFETY: by the type's invariant `vmf` is valid.
        unsafe { (*self.vmf).__bindgen_anon_1.vma }
    }

    /// The page's size is 4 KiB, this many times doubled: 0, 9 or 18, as x86 has no others.
    pub(crate) fn order(&self) -> u32 {
        self.order
    }

    /// The error where there is no memory for this page.
    pub(crate) fn refusal(&self) -> FaultError {
        if self.order == 0 {
            FaultError::Bus
        } else {
            FaultError::Smaller
        }
    }

    /// The number that the area got.
    pub(crate) fn number(&self) -> usize {
        // SAFETY: by the type's invariant the fault has an area, which is locked for reading.
        unsafe { (*self.area()).vm_private_data as usize }
    }

    /// Whether the area lets the process write.
    pub(crate) fn is_area_writable(&self) -> bool {
        // SAFETY: by the type's invariant the fault has an area, which is locked for reading.
        unsafe { (*self.area()).__bindgen_anon_2.vm_flags & flags::WRITE != 0 }
    }

    /// The file offset that the page is to show, and its length. `None` where the page would not
    /// fit into the area.
    pub(crate) fn place(&self) -> Option<(u64, u64)> {
        let size = (PAGE_SIZE as usize) << self.order;
        // SAFETY: by the type's invariant the fault has an area, which is locked for reading.
        let (address, pgoff, start, end) = unsafe {
            let (fault, area) = (&(*self.vmf).__bindgen_anon_1, &*self.area());
            let place = &area.__bindgen_anon_1.__bindgen_anon_1;
            (fault.address, fault.pgoff, place.vm_start, place.vm_end)
        };
        let first = address & !(size - 1);
        if first < start || first.checked_add(size)? > end {
            return None;
        }
        let offset = PAGE_SIZE
            .checked_mul(pgoff as u64)?
            .checked_sub((address - first) as u64 & !(PAGE_SIZE - 1))?;
        Some((offset, size as u64))
    }

    /// Maps the page at `offset` of `memory`.
    pub(crate) fn insert(&self, memory: &Memory, offset: u64) -> Result<FaultResult, FaultError> {
        let size = PAGE_SIZE << self.order;
        let address = memory
            .start()
            .checked_add(offset)
            .filter(|address| address % size == 0)
            .ok_or(self.refusal())?;
        if offset
            .checked_add(size)
            .is_none_or(|end| end > memory.len())
        {
            return Err(self.refusal());
        }
        // The kernel gives large pages another type than small ones, as it leaves the attribute's
        // bit where that of small pages is.
        if self.order > 0 && !memory.is_write_back() {
            return Err(FaultError::Smaller);
        }
        let pfn = (address / PAGE_SIZE) as usize;
        // SAFETY: by the type's invariant this is a fault of an area that is VM_PFNMAP and not
        // private, as these functions demand. The pages are within `memory`, which is no RAM of
        // this machine, whatever the process does with them.
        let code = unsafe {
            let (fault, area) = (&(*self.vmf).__bindgen_anon_1, self.area());
            let is_write = (*self.vmf).flags & bindings::fault_flag_FAULT_FLAG_WRITE != 0;
            match self.order {
                0 => bindings::vmf_insert_pfn(area, fault.address & !(PAGE_SIZE as usize - 1), pfn),
                9 => bindings::vmf_insert_pfn_pmd(self.vmf, pfn, is_write),
                18 => bindings::vmf_insert_pfn_pud(self.vmf, pfn, is_write),
                _ => return Err(self.refusal()),
            }
        };
        Ok(FaultResult(code))
    }
}
