// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VM with private RAM: that of this process.

use std::os::fd::OwnedFd;

use kvmmem_client::vmm::{Region, Registration};
use rustix::fs::{Mode, OFlags};

use super::{TestBroker, target};

/// Where the second region begins.
pub(crate) const HIGH: u64 = 1 << 32;

/// The RAM of a VM in the memory of this process: 3 MiB from 0, 64 KiB from 4 GiB.
pub(crate) struct Private {
    pub(crate) memory: Vec<u8>,
    pub(crate) vm: u64,
}

impl Private {
    pub(crate) const LOW_LEN: u64 = 3 << 20;
    pub(crate) const HIGH_LEN: u64 = 64 << 10;

    pub(crate) fn start(broker: &TestBroker, name: &str) -> Self {
        let len = usize::try_from(Self::LOW_LEN + Self::HIGH_LEN).unwrap() + 0x1000;
        let mut memory = vec![0; len];
        let hva = (memory.as_ptr().addr() as u64).next_multiple_of(0x1000);
        let start = usize::try_from(hva).unwrap() - memory.as_ptr().addr();
        for (at, byte) in memory[start..].iter_mut().enumerate() {
            *byte = pattern(at as u64);
        }
        let region = |gpa, len, offset| Region { gpa, len, offset, file: 0 };
        let regions =
            vec![region(0, Self::LOW_LEN, hva), region(HIGH, Self::HIGH_LEN, hva + Self::LOW_LEN)];
        let own = rustix::fs::open("/proc/self/mem", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
            .unwrap();
        let vm = Self::register(broker, name, own, regions);
        Self { memory, vm }
    }

    /// Registers a VM with private RAM; returns its number.
    pub(crate) fn register(
        broker: &TestBroker,
        name: &str,
        memory: OwnedFd,
        regions: Vec<Region>,
    ) -> u64 {
        let registration = Registration { regions, ..target(name) };
        broker.state.register_private(registration, memory, std::process::id()).unwrap()
    }
}

/// What is at an offset of the memory at first.
pub(crate) fn pattern(at: u64) -> u8 {
    (at % 251) as u8
}
