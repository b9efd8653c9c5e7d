// SPDX-License-Identifier: GPL-2.0-only
//! `kvmmem.ko`: `/dev/kvmmem`, by which a process maps pages of another virtual machine over its own.
//!
//! A MAP goes through the files in this order: [`device`] (the ioctl), [`process`] and [`table`] (who owns which GVA),
//! [`page`] (the tool's page, checked, charged and pinned), [`hypercall`] (the host's answer). UNMAP, closing the file
//! and the end of the process go back the same way.
//!
//! Locks: each process's table has one mutex, the only lock of the module. It is a leaf: nothing that sleeps longer
//! (user memory, pinning, the host) happens under it.
//!
//! `sys` is the only file with unsafe code; `shim.c` holds what exists as macros or inline functions only.
#![deny(unsafe_code)]

use kernel::debugfs::{Dir, File};
use kernel::miscdevice::{MiscDeviceOptions, MiscDeviceRegistration};
use kernel::prelude::*;

use crate::device::OpenFile;
use crate::hypercall::Way;
use crate::stats::Report;
use crate::sys::Processes;

// The crates' sources are public there, and whole: the module uses a part.
#[allow(unreachable_pub, dead_code)]
mod abi;
mod device;
mod hypercall;
mod page;
mod process;
mod stats;
#[allow(unsafe_code)]
mod sys;
#[allow(unreachable_pub, dead_code)]
mod table;
mod tree;

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
        force_vmcall: bool {
            default: false,
            description: "Use vmcall without asking CPUID whether the host serves it",
        },
        force_port: u16 {
            default: 0,
            description: "Use this doorbell port without asking CPUID whether the host serves it",
        },
    },
}

/// What exists while the module is loaded.
#[pin_data]
struct Kvmmem {
    // Dropped in this order: the device first, and at last a wait for what its files shared.
    #[pin]
    device: MiscDeviceRegistration<OpenFile>,
    #[pin]
    counters: File<Report>,
    directory: Dir,
    processes: Processes,
}

impl kernel::InPlaceModule for Kvmmem {
    fn init(_module: &'static ThisModule) -> impl PinInit<Self, Error> {
        let directory = Dir::new(c"kvmmem");
        try_pin_init!(Self {
            _: { hypercall::choose(forced_way())? },
            counters <- directory.read_only_file(c"counters", Report),
            directory,
            processes: Processes,
            // Last, because a file may be opened from here on.
            device <- MiscDeviceRegistration::register(MiscDeviceOptions { name: c"kvmmem" }),
        })
    }
}

/// The way to the host that the module's parameters demand.
fn forced_way() -> Option<Way> {
    match *module_parameters::force_port.value_ref() {
        0 => module_parameters::force_vmcall.value().then_some(Way::Vmcall),
        port => Some(Way::Doorbell(port)),
    }
}

/// Most pages that one open file may have mapped.
fn max_pages_per_file() -> u64 {
    module_parameters::max_pages_per_file.value()
}
