// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Keyboard controller (i8042), of which guests use only the command that resets the machine.

use vm_superio::{I8042Device, Trigger};

use super::bus::BusDevice;
use crate::machine::stop::{GenerationEnd, StopHandle};

/// First port.
pub(crate) const BASE_PORT: u16 = 0x60;
/// Number of ports.
pub(crate) const PORTS: u64 = 5;

/// Ends the machine's generation by a reset.
struct ResetTrigger(StopHandle);

impl Trigger for ResetTrigger {
    type E = std::convert::Infallible;

    fn trigger(&self) -> Result<(), Self::E> {
        self.0.end(GenerationEnd::Reset);
        Ok(())
    }
}

/// The controller.
pub(crate) struct I8042(I8042Device<ResetTrigger>);

impl I8042 {
    pub(crate) fn new(stop: StopHandle) -> Self {
        Self(I8042Device::new(ResetTrigger(stop)))
    }
}

impl BusDevice for I8042 {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            let Ok(()) = self.0.write(offset, *byte);
        }
    }
}
