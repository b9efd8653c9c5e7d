// SPDX-License-Identifier: GPL-2.0-only
//! Areas of a process's memory that a device fills by faults. C header: `include/linux/mm.h`.

use core::ffi::c_void;
use core::marker::PhantomData;
use core::ops::Deref;

use kernel::bindings;
use kernel::fs::File;
use kernel::miscdevice::MiscDevice;
use kernel::mm::virt::{flags, VmaNew, VmaRef};
use kernel::prelude::*;
use kernel::types::ForeignOwnable;

use super::memory::Memory;
use crate::abi::ioctl::PAGE_SIZE;

// The area is opaque there: only a pointer passes.
#[allow(improper_ctypes)]
extern "C" {
    fn kvmmem_set_pfnmap(vma: *mut bindings::vm_area_struct);
}

/// What the areas of an open file call.
pub(crate) trait Areas: MiscDevice<Ptr = Pin<KBox<Self>>> {
    /// Maps one page, of any size.
    fn fault(&self, fault: &Fault) -> Result<FaultResult, FaultError>;

    /// There is one more counted area: a part of another one, or one that is moved.
    fn area_opened();

    /// A counted area is gone.
    fn area_closed();
}

/// A shared area that is being set up.
///
/// # Invariants
///
/// Its file is open and has a `T` as its private data, and no other thread uses the area.
pub(crate) struct NewArea<'a, T> {
    area: &'a VmaNew,
    _file: PhantomData<T>,
}

impl<'a, T: Areas> NewArea<'a, T> {
    /// `EINVAL` for a private area.
    ///
    /// # Safety
    ///
    /// The area must be one that is being set up for an open file whose private data is a `T`.
    pub(super) unsafe fn new(area: &'a VmaNew) -> Result<Self> {
        if area.flags() & flags::MAYSHARE == 0 {
            return Err(EINVAL);
        }
        // INVARIANT: by the function's contract.
        Ok(Self {
            area,
            _file: PhantomData,
        })
    }

    /// Lets the pages come by faults; `number` comes back with each of them.
    pub(crate) fn fill_by_faults(&self, number: usize) {
        self.set_dontexpand();
        self.set_dontdump();
        let vma = self.as_ptr();
        // SAFETY: by the type's invariant no other thread uses the area, and the functions of
        // `OPERATIONS` find a `T` at its file. VM_PFNMAP is valid for it: it is not private, and
        // gets its pages from `vmf_insert_pfn` and the like only.
        unsafe {
            kvmmem_set_pfnmap(vma);
            (*vma).vm_ops = Self::OPERATIONS;
            (*vma).vm_private_data = number as *mut c_void;
        }
    }

    /// Says to [`Areas`] how many such areas there are, if pages come by faults; else nothing. The
    /// caller counts this one.
    pub(crate) fn count(&self) {
        let vma = self.as_ptr();
        // SAFETY: by the type's invariant no other thread uses the area. Its operations are null or
        // a valid table, and where `fill_by_faults` has set them `COUNTED` will do as well.
        unsafe {
            if core::ptr::eq((*vma).vm_ops, Self::OPERATIONS) {
                (*vma).vm_ops = Self::COUNTED;
            }
        }
    }

    const COUNTED: &'static bindings::vm_operations_struct = &bindings::vm_operations_struct {
        open: Some(area_opened::<T>),
        close: Some(area_closed::<T>),
        ..*Self::OPERATIONS
    };

    const OPERATIONS: &'static bindings::vm_operations_struct = &bindings::vm_operations_struct {
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

/// Whether [`NewArea::<T>::count`] has set the area up.
pub(crate) fn is_counted<T: Areas>(area: &VmaRef) -> bool {
    // SAFETY: a `VmaRef` exists only while the area is locked at least for reading, so its
    // operations, which are null or a valid table, do not change.
    let operations = unsafe { (*area.as_ptr()).vm_ops.as_ref() };
    operations
        .and_then(|table| table.close)
        .map(|close| close as usize)
        == Some(area_closed::<T> as usize)
}

/// Whether an area is one of this file.
pub(crate) fn is_of(area: &VmaRef, file: &File) -> bool {
    // SAFETY: a `VmaRef` exists only while the area is locked at least for reading, so its file
    // does not change.
    core::ptr::eq(unsafe { (*area.as_ptr()).vm_file }, file.as_ptr())
}

extern "C" fn area_opened<T: Areas>(_vma: *mut bindings::vm_area_struct) {
    T::area_opened();
}

extern "C" fn area_closed<T: Areas>(_vma: *mut bindings::vm_area_struct) {
    T::area_closed();
}

/// # Safety
///
/// `vmf` is a fault being handled, in an area that [`NewArea::<T>::fill_by_faults`] has set up.
unsafe extern "C" fn fault<T: Areas>(vmf: *mut bindings::vm_fault) -> bindings::vm_fault_t {
    // SAFETY: by the function's contract, which is that of `huge_fault` too; order 0 is a small
    // page.
    unsafe { huge_fault::<T>(vmf, 0) }
}

/// # Safety
///
/// `vmf` is a fault being handled, in an area that [`NewArea::<T>::fill_by_faults`] has set up.
unsafe extern "C" fn huge_fault<T: Areas>(
    vmf: *mut bindings::vm_fault,
    order: u32,
) -> bindings::vm_fault_t {
    // SAFETY: by the function's contract the fault has an area, which is locked for reading. It
    // keeps a file open whose private data is a `T`.
    let (at, area, file) = unsafe {
        let at = &(*vmf).__bindgen_anon_1;
        let area = &*at.vma;
        let data = (*area.vm_file).private_data;
        (at, area, <T::Ptr as ForeignOwnable>::borrow(data))
    };
    // SAFETY: the bounds and flags do not change while the area is locked.
    let (bounds, area_flags) = unsafe {
        (
            &area.__bindgen_anon_1.__bindgen_anon_1,
            area.__bindgen_anon_2.vm_flags,
        )
    };
    let size = (PAGE_SIZE as usize).wrapping_shl(order);
    let before = at.address & size.wrapping_sub(1);
    let first = at.address - before;
    let is_inside = first >= bounds.vm_start && bounds.vm_end - first >= size;
    // INVARIANT: by the function's contract, for the time of this call.
    let fault = Fault {
        vmf,
        order,
        number: area.vm_private_data as usize,
        is_writable: area_flags & flags::WRITE != 0,
        offset: (at.pgoff as u64)
            .checked_sub(before as u64 / PAGE_SIZE)
            .and_then(|page| page.checked_mul(PAGE_SIZE))
            .filter(|_| is_inside),
    };
    let code = match file.fault(&fault) {
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
/// `vmf` is a fault being handled, for a page of this order, in an area that
/// [`NewArea::fill_by_faults`] set up.
pub(crate) struct Fault {
    vmf: *mut bindings::vm_fault,
    /// The page's size is 4 KiB, this many times doubled: 0, 9 or 18, as x86 has no others.
    pub(crate) order: u32,
    /// The number that the area got.
    pub(crate) number: usize,
    /// Whether the area lets the process write.
    pub(crate) is_writable: bool,
    /// The file offset that the page is to show; `None` where it would not fit into the area.
    pub(crate) offset: Option<u64>,
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
    /// The error where there is no memory for this page.
    pub(crate) fn refusal(&self) -> FaultError {
        if self.order == 0 {
            FaultError::Bus
        } else {
            FaultError::Smaller
        }
    }

    /// Maps the page at `offset` of `memory`.
    pub(crate) fn insert(&self, memory: &Memory, offset: u64) -> Result<FaultResult, FaultError> {
        let size = PAGE_SIZE.wrapping_shl(self.order);
        let is_inside = memory.len().checked_sub(size) >= Some(offset);
        let address = memory.start().wrapping_add(offset);
        // The kernel gives large pages another type than small ones, as it leaves the attribute's
        // bit where that of small pages is.
        let is_cached = self.order == 0 || memory.is_write_back();
        if !is_inside || address & size.wrapping_sub(1) != 0 || !is_cached {
            return Err(self.refusal());
        }
        let pfn = (address / PAGE_SIZE) as usize;
        // SAFETY: by the type's invariant this is a fault of an area that is VM_PFNMAP and not
        // private, as these functions demand. The pages are within `memory`, which is no RAM of
        // this machine, so the process cannot free them by any use of its mapping.
        let code = unsafe {
            let fault = &(*self.vmf).__bindgen_anon_1;
            let is_write = (*self.vmf).flags & bindings::fault_flag_FAULT_FLAG_WRITE != 0;
            match self.order {
                0 => bindings::vmf_insert_pfn(
                    fault.vma,
                    fault.address & !(PAGE_SIZE as usize - 1),
                    pfn,
                ),
                9 => bindings::vmf_insert_pfn_pmd(self.vmf, pfn, is_write),
                18 => bindings::vmf_insert_pfn_pud(self.vmf, pfn, is_write),
                _ => return Err(self.refusal()),
            }
        };
        Ok(FaultResult(code))
    }
}
