// SPDX-License-Identifier: GPL-2.0-only
//! PCI functions: where they are, their enabling and their BARs. C header: `include/linux/pci.h`.

use core::ffi::c_int;

use kernel::bindings;
use kernel::device::{Core, DeviceContext};
use kernel::error::to_result;
use kernel::pci::Device;
use kernel::prelude::*;

// `pci_dev` is opaque here: only a pointer passes.
#[allow(improper_ctypes)]
extern "C" {
    fn kvmmem_pci_domain(device: *mut bindings::pci_dev) -> c_int;
}

/// Whether this machine has a PCI bus.
pub(crate) fn has_bus() -> bool {
    // SAFETY: null begins a walk over the buses; the result is compared with null only.
    !unsafe { bindings::pci_find_next_bus(core::ptr::null()) }.is_null()
}

fn raw<C: DeviceContext>(device: &Device<C>) -> *mut bindings::pci_dev {
    // A transparent wrapper of it.
    core::ptr::from_ref(device).cast_mut().cast()
}

/// Where a function is: its slot's domain (bits 16 to 31), bus (8 to 15) and slot (3 to 7), and its
/// number there.
pub(crate) fn place(device: &Device<Core<'_>>) -> (u32, u32) {
    // SAFETY: the reference keeps the device valid, and its bus with it.
    let domain = unsafe { kvmmem_pci_domain(raw(device)) } as u32;
    let id = u32::from(device.dev_id());
    (domain << 16 | id & !7, id & 7)
}

/// Whether function 0 of the device's slot is of the same kind, has a BAR 2 of `len` bytes and no
/// driver: it may come to be ours.
pub(crate) fn is_head_pending(device: &Device<Core<'_>>, len: u64) -> bool {
    let own = raw(device);
    // SAFETY: both devices are valid, the other one as long as it is counted. What is read of it
    // does not change, but for the driver, which is compared with null only and is a hint.
    unsafe {
        let head = bindings::pci_get_slot((*own).bus, (*own).devfn & !7);
        if head.is_null() {
            return false;
        }
        let is_same_kind = (*head).vendor == (*own).vendor && (*head).device == (*own).device;
        let is_page = bindings::pci_resource_len(head, 2) == len;
        let is_free = core::ptr::addr_of!((*head).dev.driver)
            .read_volatile()
            .is_null();
        bindings::pci_dev_put(head);
        is_same_kind && is_page && is_free
    }
}

/// A device whose memory is enabled for this driver. That is undone when dropped; another driver's
/// use of the device, which is counted apart, goes on.
///
/// # Invariants
///
/// The device's count of enablers has one for this value.
pub(crate) struct EnabledDevice<'bound>(&'bound Device);

impl<'bound> EnabledDevice<'bound> {
    pub(crate) fn new(device: &'bound Device<Core<'_>>) -> Result<Self> {
        device.enable_device_mem()?;
        // INVARIANT: just enabled.
        Ok(Self(device))
    }
}

impl Drop for EnabledDevice<'_> {
    fn drop(&mut self) {
        // SAFETY: the reference keeps the device valid; gives up the enabling of the type's
        // invariant.
        unsafe { bindings::pci_disable_device(raw(self.0)) };
    }
}

/// A BAR that no other driver claims. User space that is root may still map it through sysfs,
/// unless the kernel has CONFIG_IO_STRICT_DEVMEM. Released when dropped.
///
/// # Invariants
///
/// The region of BAR `bar` is requested for this value.
pub(crate) struct BarRegion<'bound> {
    device: &'bound Device,
    bar: c_int,
    start: u64,
    len: u64,
}

impl<'bound> BarRegion<'bound> {
    /// Reserves a BAR of an enabled device: `EBUSY` where another driver has it.
    pub(crate) fn request(device: &'bound Device<Core<'_>>, bar: u32) -> Result<Self> {
        let (start, len) = (device.resource_start(bar)?, device.resource_len(bar)?);
        let bar = c_int::try_from(bar)?;
        // SAFETY: the reference keeps the device valid, `resource_len` has checked the BAR's
        // number, and the name is a constant.
        to_result(unsafe {
            bindings::pci_request_region(raw(device), bar, c"kvmmem".as_char_ptr())
        })?;
        // INVARIANT: just requested.
        Ok(Self {
            device,
            bar,
            start,
            len,
        })
    }

    pub(crate) fn start(&self) -> u64 {
        self.start
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }
}

impl Drop for BarRegion<'_> {
    fn drop(&mut self) {
        // SAFETY: the device outlives its binding to the driver, and by the type's invariant the
        // region was requested.
        unsafe { bindings::pci_release_region(raw(self.device), self.bar) };
    }
}
