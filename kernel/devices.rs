// SPDX-License-Identifier: GPL-2.0-only
//! PCI driver: binds those of QEMU's `ivshmem-plain` functions that show views, and ends the views
//! of a function that is unbound.

use kernel::device::Core;
use kernel::pci;
use kernel::prelude::*;
use kernel::sync::{Arc, Completion};

use crate::abi::descriptor::{
    COMPLAINT_INVALID, COMPLAINT_NOT_CACHED, COMPLAINT_NO_ADDRESS, MAGIC, SLOT_AT,
};
use crate::abi::ioctl::PAGE_SIZE;
use crate::power::UseGuard;
use crate::slot::{Bar, Head, Slot, Window};
use crate::slots;
use crate::sys::memory::Memory;
use crate::sys::pci::{is_head_pending, place, BarRegion, EnabledDevice};
use crate::window::PART;

const IVSHMEM: u32 = 0x1110;

/// The BAR that is the shared memory.
const MEMORY: u32 = 2;

kernel::pci_device_table!(
    IDS,
    (),
    [(
        pci::DeviceId::from_id(pci::Vendor::REDHAT_QUMRANET, IVSHMEM),
        ()
    )]
);

/// The driver.
pub(crate) struct Driver;

/// A function of a slot, bound to the driver.
pub(crate) struct Function<'bound> {
    slot: Arc<Slot>,
    number: u32,
    /// Of a window: completed when nothing uses it.
    unused: Option<Arc<Completion>>,
    // Released once `drop` has waited for the users; none where it has no address. Before the
    // enabling.
    _region: Option<BarRegion<'bound>>,
    _enabled: Option<EnabledDevice<'bound>>,
}

impl pci::Driver for Driver {
    type IdInfo = ();
    type Data<'bound> = Function<'bound>;
    const ID_TABLE: pci::IdTable<()> = &IDS;

    fn probe<'bound>(
        device: &'bound pci::Device<Core<'_>>,
        _info: Option<&'bound ()>,
    ) -> impl PinInit<Function<'bound>, Error> + 'bound {
        match place(device) {
            (place, 0) => Function::head(device, place),
            (place, number) => Function::window(device, place, number),
        }
    }
}

impl<'bound> Function<'bound> {
    /// Function 0: ours if its memory is a descriptor's page.
    fn head(device: &'bound pci::Device<Core<'_>>, place: u32) -> Result<Self> {
        if device.resource_len(MEMORY)? != PAGE_SIZE {
            return Err(ENODEV);
        }
        let enabled = EnabledDevice::new(device)?;
        let region = BarRegion::request(device, MEMORY)?;
        let page = Memory::map_any(region.start(), PAGE_SIZE)?;
        if page.read_u64(0) != MAGIC {
            return Err(ENODEV);
        }
        let mut digest = [0; 32];
        for (index, word) in digest.chunks_exact_mut(8).enumerate() {
            word.copy_from_slice(&page.read_u64(32 + 8 * index).to_le_bytes());
        }
        let number = page.read_u64(SLOT_AT) as u32;
        // Tried again when the machine is awake.
        let _beginning = UseGuard::begin().map_err(|_| EPROBE_DEFER)?;
        let slot = slots::add_head(
            place,
            Head {
                page,
                digest,
                number,
            },
        )?;
        Ok(Self {
            slot,
            number: 0,
            unused: None,
            _region: Some(region),
            _enabled: Some(enabled),
        })
    }

    /// Another function: a window, if function 0 of its slot is ours.
    fn window(device: &'bound pci::Device<Core<'_>>, place: u32, number: u32) -> Result<Self> {
        if !slots::has_head(place) {
            // Tried again whenever a device was bound.
            return Err(if is_head_pending(device, PAGE_SIZE) {
                EPROBE_DEFER
            } else {
                ENODEV
            });
        }
        // An unassigned BAR may not keep the device from being enabled.
        let enabled = EnabledDevice::new(device).ok();
        let has_address = enabled.is_some() && device.resource_start(MEMORY)? != 0;
        let region = if has_address {
            Some(BarRegion::request(device, MEMORY)?)
        } else {
            None
        };
        let window = region.as_ref().map_or(Ok(Err(COMPLAINT_NO_ADDRESS)), bar)?;
        let unused = window.as_ref().ok().map(|bar| bar.unused.clone());
        let slot = slots::add_window(place, number, window).ok_or(ENODEV)?;
        Ok(Self {
            slot,
            number,
            unused,
            _region: region,
            _enabled: enabled,
        })
    }
}

/// The window, if its memory can be mapped write-back.
fn bar(region: &BarRegion<'_>) -> Result<Window> {
    let (start, len) = (region.start(), region.len());
    match Memory::map(start, len.min(PART)) {
        Ok(_) => Bar::new(start, len).map(Ok),
        Err(error) if error == EOPNOTSUPP => Ok(Err(COMPLAINT_NOT_CACHED)),
        Err(error) if error == EINVAL => Ok(Err(COMPLAINT_INVALID)),
        Err(error) => Err(error),
    }
}

impl Drop for Function<'_> {
    fn drop(&mut self) {
        slots::remove(&self.slot, self.number);
        // The view that shows it finds out by itself within some milliseconds, ends, takes its
        // pages from all processes and then gives up its mappings. Readers of the view do not sleep
        // for long.
        if let Some(unused) = &self.unused {
            unused.wait_for_completion();
        }
    }
}
