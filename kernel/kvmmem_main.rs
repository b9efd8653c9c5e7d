// SPDX-License-Identifier: GPL-2.0-only
//! `kvmmem.ko`: the driver of `/dev/kvmmem`, with which a process in a guest reads the memory of
//! another virtual machine, through a view or page by page in place of its own memory (v1).
//!
//! Layers of a view, outermost first: [`device`] (system calls), [`native`] or [`regions`] (the two
//! sets of ioctls), [`view`] and [`transfer`] (mmap, faults, poll; read, write, lseek),
//! [`contents`] (what it shows at a generation), [`attachment`] (the host's side, read by a
//! [`snapshot`] of its descriptor), [`window`] (the memory). [`watch`] notices the host's changes.
//!
//! Without hypercalls, views come as PCI devices: [`devices`] (the driver), [`slot`] (a descriptor
//! and its windows, with its [`users`]), [`slots`] (all slots, and the one that a token claims or
//! that lists it).
//!
//! Layers of v1's MAP: [`device`] (the ioctl), [`page_file`] (the open file), [`process`] and
//! [`table`] (the owner of each GVA), [`page`] (the tool's page: checked, charged and pinned),
//! [`hypercall`] (the host's answer). UNMAP, closing the file and the end of the process use the
//! same layers. Where views are PCI devices, [`page_file`] has [`window_page`] instead: the page of
//! a view in the place of the tool's.
//!
//! Locks, outermost first. Two locks are held together only if one line names both:
//!
//! - `WindowPages::files`; then, one after the other, those of opening the device, and those below
//!   of an inner file and of the process's memory.
//! - `OpenFile::making` and `OpenFile::inner`, each by itself; the latter also in mmap.
//! - `View::attaching`, while the host opens or closes the file's view; then `View::regions` by
//!   itself, or `View::changing` and those below.
//! - `View::changing`, while the contents are replaced; then `SLOTS` and `Slot::state`, or the
//!   device's `i_mmap_rwsem` (zapping).
//! - a process's `mmap_lock` or an area's lock: in mmap then `View::changing`, or a reader of the
//!   contents and `View::regions`; in a fault a reader of the contents and the page tables' locks.
//! - a PCI device's lock (probe, unbind); then `SLOTS`, and then the `Slot::state` of one slot at a
//!   time.
//! - `CACHING`, under any of them, while memory is mapped into the kernel.
//! - `PageFile::joining`, while the process's MMU notifier is registered; then the process's
//!   `mmap_lock`.
//! - each process's table of v1 has a mutex of its own.
//!
//! The notifiers of [`power`] take none of them but `SLOTS`. Going down waits for MAPs and ATTACHes
//! in progress.
//!
//! User memory is never accessed under any of them: it may be a mapping of this very device. The
//! host opens and closes views under `attaching`, or when the last file is closed, and looks for
//! data (SEEK) under no lock.
//!
//! Readers of a view's contents ([`sys::published`]) are no lock for each other. Two places wait
//! for them: `View::replace` under `changing`, and the unbinding of a window's function under the
//! PCI device's lock, which waits for the contents that use the window. So a reader takes neither
//! of these two locks and never waits for user memory: copies are made without page faults, and
//! missing pages are faulted in between. The view replaces its contents by itself, since its work
//! looks at the slot every 4 ms while a window of PCI devices is mapped. So unbinding need not find
//! the view, and no view is found by its slot.
//!
//! Only `sys/` has unsafe code; `shim.c` wraps macros and inline functions of the kernel.
#![deny(unsafe_code)]

use kernel::debugfs::{Dir, File};
use kernel::driver;
use kernel::miscdevice::MiscDeviceOptions;
use kernel::pci;
use kernel::prelude::*;

use crate::device::OpenFile;
use crate::devices::Driver;
use crate::hypercall::Transport;
use crate::stats::Report;
use crate::sys::misc::Registration;
use crate::sys::notifier::Unload;
use crate::sys::power::PowerHook;

// The crates' sources are public there, and whole: the module uses a part.
#[allow(unreachable_pub, dead_code)]
mod abi;
mod attachment;
mod contents;
mod device;
mod devices;
mod hypercall;
mod knobs;
mod native;
mod page;
mod page_file;
mod power;
mod process;
mod regions;
mod slot;
mod slots;
mod snapshot;
mod stats;
#[allow(unsafe_code)]
mod sys;
#[allow(unreachable_pub, dead_code)]
mod table;
mod transfer;
mod tree;
mod users;
mod view;
mod watch;
mod window;
mod window_page;

macro_rules! kvmmem {
    ($($selftest:tt)*) => {
        module! {
            type: Kvmmem,
            name: "kvmmem",
            authors: ["The kvmmem developers"],
            description: "Map the memory of other virtual machines",
            license: "GPL v2",
            params: {
                max_pages_per_file: u64 {
                    default: 65536,
                    description: "Most pages that one open file may have mapped",
                },
                regions: bool {
                    default: true,
                    description: "Offer libkvmi's region ioctls (v2) where the host opens views; without them it uses v1",
                },
                $($selftest)*
            },
        }
    };
}

#[cfg(not(kvmmem_selftest))]
kvmmem! {}

// What the selftest forces upon the module: see `knobs`.
#[cfg(kvmmem_selftest)]
kvmmem! {
    force_vmcall: bool {
        default: false,
        description: "Use vmcall without asking CPUID whether the host serves it",
    },
    force_port: u16 {
        default: 0,
        description: "Use this doorbell port without asking CPUID whether the host serves it",
    },
    force_gsi: u8 {
        default: 0,
        description: "With force_port: the host raises this interrupt when views have changed",
    },
    force_window: bool {
        default: false,
        description: "With force_port: the host opens views",
    },
    test_descriptor: u64 {
        default: 0,
        description: "With force_port: GPA of the first of the descriptor pages that stand in for the host's answers",
    },
}

type PciDriver = Pin<KBox<driver::Registration<pci::Adapter<Driver>>>>;

/// What exists while the module is loaded.
#[pin_data]
struct Kvmmem {
    // Dropped in this order: the device first, and at last a wait for what its files shared.
    #[pin]
    device: Registration<OpenFile>,
    // Where the host is not called.
    driver: Option<PciDriver>,
    #[pin]
    counters: File<Report>,
    directory: Dir,
    power: PowerHook,
    unload: Unload,
}

impl kernel::InPlaceModule for Kvmmem {
    fn init(module: &'static ThisModule) -> impl PinInit<Self, Error> {
        let directory = Dir::new(c"kvmmem");
        try_pin_init!(Self {
            _: { hypercall::choose()? },
            counters <- directory.read_only_file(c"counters", Report),
            directory,
            power: PowerHook::register(power::on_event)?,
            unload: Unload,
            driver: pci_driver(module)?,
            // Last, because a file may be opened from here on.
            device <- Registration::register(MiscDeviceOptions { name: c"kvmmem" }),
        })
    }
}

/// The PCI driver, where views can come as devices.
fn pci_driver(module: &'static ThisModule) -> Result<Option<PciDriver>> {
    match hypercall::transport() {
        Transport::Devices => {
            KBox::pin_init(driver::Registration::new(c"kvmmem", module), GFP_KERNEL).map(Some)
        }
        Transport::Windows | Transport::None => Ok(None),
    }
}

/// Whether libkvmi's region ioctls are there.
fn offers_regions() -> bool {
    module_parameters::regions.value() && hypercall::transport() != Transport::None
}

/// Most pages that one open file may have mapped.
fn max_pages_per_file() -> u64 {
    module_parameters::max_pages_per_file.value()
}
