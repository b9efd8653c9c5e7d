// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Drivers that set the device up in order, and drivers that write any register at any time.

use std::sync::Mutex;

use proptest::prelude::*;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::EFD_NONBLOCK;

use super::*;

/// Counts activations and resets, and keeps the last features and queue.
#[derive(Default)]
struct CallLog {
    activations: usize,
    resets: usize,
    features: u64,
    ring: Option<(u64, u64, u64, u16)>,
}

struct Dummy(Arc<Mutex<CallLog>>);

impl VirtioDevice for Dummy {
    fn id(&self) -> u32 {
        42
    }
    fn features(&self) -> u64 {
        0b110
    }
    fn queue_sizes(&self) -> &'static [u16] {
        &[16, 16]
    }
    fn config(&self) -> &[u8] {
        &[1, 2, 3, 4, 5]
    }
    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let mut log = self.0.lock().unwrap();
        log.activations += 1;
        log.features = activation.features;
        let queue = &activation.queues[1];
        log.ring = Some((queue.desc_table(), queue.avail_ring(), queue.used_ring(), queue.size()));
        Ok(())
    }
    fn reset(&mut self) {
        self.0.lock().unwrap().resets += 1;
    }
}

fn transport() -> (VirtioMmio, Arc<Mutex<CallLog>>) {
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x1_0000)]).unwrap());
    let event = || EventFd::new(EFD_NONBLOCK).unwrap();
    let log = Arc::default();
    (
        VirtioMmio::new(Box::new(Dummy(Arc::clone(&log))), memory, event(), vec![event(), event()]),
        log,
    )
}

fn read(mmio: &mut VirtioMmio, offset: u64) -> u32 {
    let mut data = [0xff; 4];
    mmio.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn write(mmio: &mut VirtioMmio, offset: u64, value: u32) {
    mmio.write(offset, &value.to_le_bytes());
}

fn negotiate(mmio: &mut VirtioMmio, features: [u32; 2]) {
    write(mmio, register::STATUS, status::ACKNOWLEDGE);
    write(mmio, register::STATUS, status::ACKNOWLEDGE | status::DRIVER);
    for (select, half) in (0..).zip(features) {
        write(mmio, register::DRIVER_FEATURES_SEL, select);
        write(mmio, register::DRIVER_FEATURES, half);
    }
    write(mmio, register::STATUS, status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK);
}

fn set_up_queue(mmio: &mut VirtioMmio, index: u32, base: u32) {
    write(mmio, register::QUEUE_SEL, index);
    write(mmio, register::QUEUE_NUM, 8);
    write(mmio, register::QUEUE_DESC_LOW, base);
    write(mmio, register::QUEUE_DRIVER_LOW, base + 0x400);
    write(mmio, register::QUEUE_DEVICE_LOW, base + 0x800);
    write(mmio, register::QUEUE_READY, 1);
}

#[test]
fn a_driver_gets_its_device() {
    let (mut mmio, log) = transport();
    assert_eq!(read(&mut mmio, register::MAGIC_VALUE), 0x7472_6976);
    assert_eq!((read(&mut mmio, register::VERSION), read(&mut mmio, register::DEVICE_ID)), (2, 42));
    assert_eq!(read(&mut mmio, register::DEVICE_FEATURES), 0b110);
    write(&mut mmio, register::DEVICE_FEATURES_SEL, 1);
    assert_eq!(read(&mut mmio, register::DEVICE_FEATURES), 1);
    assert_eq!(read(&mut mmio, register::CONFIG), 0x0403_0201);
    assert_eq!(read(&mut mmio, register::CONFIG + 4), 5);

    negotiate(&mut mmio, [0b010, 1]);
    assert_ne!(read(&mut mmio, register::STATUS) & status::FEATURES_OK, 0);
    set_up_queue(&mut mmio, 0, 0x1000);
    set_up_queue(&mut mmio, 1, 0x2000);
    write(&mut mmio, register::STATUS, 0xf);
    assert_eq!(read(&mut mmio, register::STATUS), 0xf);
    assert_eq!(read(&mut mmio, register::QUEUE_READY), 1);
    {
        let log = log.lock().unwrap();
        assert_eq!((log.activations, log.features), (1, 0b010 | F_VERSION_1));
        assert_eq!(log.ring, Some((0x2000, 0x2400, 0x2800, 8)));
    }
    write(&mut mmio, register::STATUS, 0);
    assert_eq!((read(&mut mmio, register::STATUS), read(&mut mmio, register::QUEUE_READY)), (0, 0));
    assert_eq!(log.lock().unwrap().resets, 1);
}

#[test]
fn features_that_were_not_offered_or_old_drivers_are_refused() {
    for features in [[0b1000, 1], [0b010, 0], [0, 3]] {
        let (mut mmio, _) = transport();
        negotiate(&mut mmio, features);
        assert_eq!(read(&mut mmio, register::STATUS) & status::FEATURES_OK, 0, "{features:?}");
    }
}

#[test]
fn queues_outside_ram_leave_a_device_that_needs_a_reset() {
    let (mut mmio, log) = transport();
    negotiate(&mut mmio, [0, 1]);
    set_up_queue(&mut mmio, 0, 0x1000);
    set_up_queue(&mut mmio, 1, 0xffff_f000);
    write(&mut mmio, register::STATUS, 0xf);
    assert_ne!(read(&mut mmio, register::STATUS) & status::DEVICE_NEEDS_RESET, 0);
    assert_eq!(read(&mut mmio, register::INTERRUPT_STATUS), INTERRUPT_CONFIG_CHANGE);
    write(&mut mmio, register::INTERRUPT_ACK, INTERRUPT_CONFIG_CHANGE);
    assert_eq!(read(&mut mmio, register::INTERRUPT_STATUS), 0);
    assert_eq!(log.lock().unwrap().activations, 0);
}

proptest! {
    /// By any accesses of a driver, the device is activated at most once between two resets, with
    /// queues within RAM.
    #[test]
    fn any_accesses_are_survived(
        accesses in prop::collection::vec(
            (
                prop_oneof![0u64..0x40, Just(0x44), Just(0x50), Just(0x64), Just(0x70), 0x80u64..0xb0, 0xf00u64..0x1000],
                prop::collection::vec(any::<u8>(), 1..9),
                any::<bool>(),
            ),
            0..200,
        ),
    ) {
        let (mut mmio, log) = transport();
        let mut resets = 0;
        for (offset, mut data, is_write) in accesses {
            if is_write {
                resets += usize::from(offset == register::STATUS && data == [0; 4]);
                mmio.write(offset, &data);
            } else {
                mmio.read(offset, &mut data);
            }
        }
        prop_assert!(log.lock().unwrap().activations <= resets + 1);
    }
}
