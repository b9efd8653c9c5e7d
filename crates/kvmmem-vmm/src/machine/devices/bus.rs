// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bus: dispatches accesses of ports or MMIO addresses to devices.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

/// A device with registers. Offsets are relative to its range; an access never crosses its end.
pub(crate) trait BusDevice: Send {
    /// Fills `data`, which arrives as all ones: what a guest reads where nothing is.
    fn read(&mut self, offset: u64, data: &mut [u8]);
    /// Takes `data`.
    fn write(&mut self, offset: u64, data: &[u8]);
}

/// A device that several vCPUs reach.
type SharedDevice = Arc<Mutex<dyn BusDevice>>;

/// One address space: ports, or MMIO.
#[derive(Default)]
pub(crate) struct Bus {
    devices: Vec<(Range<u64>, SharedDevice)>,
}

impl Bus {
    /// Puts `device` at `length` addresses from `base`. The machine's layout keeps the ranges
    /// apart.
    pub(crate) fn insert(&mut self, base: u64, length: u64, device: SharedDevice) {
        self.devices.push((base..base + length, device));
    }

    pub(crate) fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).read(offset, data);
        }
    }

    pub(crate) fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address, data.len()) {
            device.lock().unwrap_or_else(PoisonError::into_inner).write(offset, data);
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, &Mutex<dyn BusDevice>)> {
        let end = address.checked_add(length as u64)?;
        let (range, device) =
            self.devices.iter().find(|(range, _)| range.contains(&address) && end <= range.end)?;
        Some((address - range.start, device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Echo(u64);

    impl BusDevice for Echo {
        fn read(&mut self, offset: u64, data: &mut [u8]) {
            data.fill(u8::try_from(offset).unwrap());
        }
        fn write(&mut self, offset: u64, _data: &[u8]) {
            self.0 = offset;
        }
    }

    #[test]
    fn accesses_reach_the_device_or_nothing() {
        let mut bus = Bus::default();
        let device = Arc::new(Mutex::new(Echo(0)));
        bus.insert(0x100, 0x10, device.clone());
        let read = |address, length| {
            let mut data = vec![0; length];
            bus.read(address, &mut data);
            data
        };
        assert_eq!(read(0x10f, 1), [0xf]);
        assert_eq!(read(0x10f, 2), [0xff, 0xff]);
        assert_eq!(read(0xff, 1), [0xff]);
        assert_eq!(read(u64::MAX, 8), [0xff; 8]);
        bus.write(0x104, &[1]);
        bus.write(0x110, &[1]);
        assert_eq!(device.lock().unwrap().0, 4);
    }
}
