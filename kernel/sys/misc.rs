// SPDX-License-Identifier: GPL-2.0-only
//! Misc device with the file operations that `kernel::miscdevice` lacks. C header:
//! `include/linux/fs.h`.

use core::ffi::c_int;
use core::marker::PhantomData;

use kernel::bindings;
use kernel::error::to_result;
use kernel::fs::File;
use kernel::miscdevice::{MiscDeviceOptions, MiscDeviceRegistration};
use kernel::mm::virt::VmaNew;
use kernel::prelude::*;
use kernel::sync::poll::PollTable;
use kernel::types::{ForeignOwnable, Opaque};

use super::area::{Areas, NewArea};
use crate::abi::ioctl::PAGE_SIZE;

/// What an open file does beside `MiscDevice`.
pub(crate) trait Device: Areas {
    /// The new position.
    fn seek(&self, current: i64, offset: i64, whence: u32) -> Result<i64>;

    fn poll(&self, file: &File, table: &PollTable<'_>) -> u32;

    /// Stands in for `MiscDevice::mmap`.
    fn map(&self, area: &NewArea<'_, Self>) -> Result;
}

/// A registered device, as [`MiscDeviceRegistration`], but with the operations of [`Device`].
///
/// # Invariants
///
/// `misc` is registered until this is dropped.
// As `MiscDeviceRegistration`, so that a pointer to one is a pointer to the other.
#[repr(transparent)]
#[pin_data(PinnedDrop)]
pub(crate) struct Registration<T> {
    #[pin]
    misc: Opaque<bindings::miscdevice>,
    _file: PhantomData<T>,
}

// SAFETY: `misc_deregister` may be called on another thread than `misc_register`.
unsafe impl<T> Send for Registration<T> {}
// SAFETY: a shared reference gives no access to the device.
unsafe impl<T> Sync for Registration<T> {}

impl<T: Device> Registration<T> {
    pub(crate) fn register(options: MiscDeviceOptions) -> impl PinInit<Self, Error> {
        const {
            assert!(size_of::<Self>() == size_of::<MiscDeviceRegistration<T>>());
        }
        try_pin_init!(Self {
            misc <- Opaque::try_ffi_init(move |slot: *mut bindings::miscdevice| {
                let misc = bindings::miscdevice {
                    fops: Self::OPERATIONS,
                    ..options.into_raw::<T>()
                };
                // SAFETY: the slot may be written by its initialiser. It is pinned, and `drop`
                // takes the device from the kernel before the slot is freed. The kernel gives its
                // address to `MiscDevice`'s open, which takes it for a `MiscDeviceRegistration<T>`:
                // that is a transparent wrapper of a `miscdevice`, as this type is.
                to_result(unsafe {
                    slot.write(misc);
                    bindings::misc_register(slot)
                })
            }),
            _file: PhantomData,
        })
    }

    const OPERATIONS: &'static bindings::file_operations = &bindings::file_operations {
        llseek: Some(llseek::<T>),
        poll: Some(poll::<T>),
        mmap: Some(mmap::<T>),
        get_unmapped_area: Some(get_unmapped_area),
        // SAFETY: `into_raw` points to a constant.
        ..unsafe { *MiscDeviceOptions { name: c"" }.into_raw::<T>().fops }
    };
}

#[pinned_drop]
impl<T> PinnedDrop for Registration<T> {
    fn drop(self: Pin<&mut Self>) {
        // SAFETY: by the type's invariant the device is registered.
        unsafe { bindings::misc_deregister(self.misc.get()) };
    }
}

/// The private data of an open file, if it is one of a [`Registration<T>`].
pub(crate) fn data<T: Device>(file: &File) -> Option<Pin<&T>> {
    let file = file.as_ptr();
    // SAFETY: an open file has a table of operations, which it does not change.
    let operations = unsafe { &*(*file).f_op };
    let is_ours = operations.poll.map(|poll| poll as usize) == Some(poll::<T> as usize);
    // SAFETY: `poll::<T>` is in the table of a `Registration<T>` only, whose files have what
    // `MiscDevice` put there as their private data, until the last reference to the file is gone.
    is_ours.then(|| unsafe { <T::Ptr as ForeignOwnable>::borrow((*file).private_data) })
}

/// # Safety
///
/// `file` is an open file of a [`Registration<T>`].
unsafe extern "C" fn llseek<T: Device>(
    file: *mut bindings::file,
    offset: i64,
    whence: c_int,
) -> i64 {
    // SAFETY: by the function's contract the private data is what `MiscDevice` put there. The
    // caller holds what guards the position.
    let (this, current) = unsafe {
        (
            <T::Ptr as ForeignOwnable>::borrow((*file).private_data),
            (*file).f_pos,
        )
    };
    match this.seek(current, offset, whence.unsigned_abs()) {
        // SAFETY: the file is open, and the caller holds what guards its position.
        Ok(position) => unsafe { bindings::vfs_setpos(file, position, i64::MAX) },
        Err(error) => error.to_errno().into(),
    }
}

/// # Safety
///
/// `file` is an open file of a [`Registration<T>`], `table` null or valid.
unsafe extern "C" fn poll<T: Device>(
    file: *mut bindings::file,
    table: *mut bindings::poll_table_struct,
) -> u32 {
    // SAFETY: by the function's contract the private data is what `MiscDevice` put there and the
    // table null or valid. Polling uses no file position.
    let (this, file, table) = unsafe {
        let this = <T::Ptr as ForeignOwnable>::borrow((*file).private_data);
        (this, File::from_raw_file(file), PollTable::from_raw(table))
    };
    this.poll(file, &table)
}

/// # Safety
///
/// `file` is an open file of a [`Registration<T>`], `vma` an area that is being set up for it.
unsafe extern "C" fn mmap<T: Device>(
    file: *mut bindings::file,
    vma: *mut bindings::vm_area_struct,
) -> c_int {
    // SAFETY: by the function's contract the private data is what `MiscDevice` put there and the
    // area is being set up for this file.
    let (this, area) = unsafe {
        let this = <T::Ptr as ForeignOwnable>::borrow((*file).private_data);
        (this, NewArea::<T>::new(VmaNew::from_raw(vma)))
    };
    area.and_then(|area| this.map(&area))
        .map_or_else(|error| error.to_errno(), |()| 0)
}

/// Addresses that are congruent to the file's offsets modulo the largest page that fits.
///
/// # Safety
///
/// `file` is an open file.
unsafe extern "C" fn get_unmapped_area(
    file: *mut bindings::file,
    hint: usize,
    len: usize,
    pgoff: usize,
    mmap_flags: usize,
) -> usize {
    const MAX_ERRNO: usize = 4095;
    const SIZES: [usize; 2] = [1 << 30, 2 << 20];
    const MAP_FIXED: usize = 0x10;
    // SAFETY: by the function's contract the file is open; any hint and length may be asked for.
    let find =
        |hint, len| unsafe { bindings::mm_get_unmapped_area(file, hint, len, pgoff, mmap_flags) };
    // A wish is left as it is, also the one for address 0.
    if hint == 0 && mmap_flags & MAP_FIXED == 0 {
        for size in SIZES.into_iter().filter(|size| len >= *size) {
            let Some(padded) = len.checked_add(size) else {
                continue;
            };
            let found = find(0, padded);
            if found < MAX_ERRNO.wrapping_neg() {
                return found
                    + (pgoff.wrapping_mul(PAGE_SIZE as usize).wrapping_sub(found) & (size - 1));
            }
        }
    }
    find(hint, len)
}
