// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Power off and reset: the sleep control, sleep status and reset registers of a hardware-reduced
//! ACPI machine (ACPI specification 6.5, 4.8.3.7 and 4.8.3.6).

use super::bus::BusDevice;
use crate::machine::stop::{GenerationEnd, StopHandle};

/// First of the registers' ports.
pub(crate) const BASE_PORT: u16 = 0x600;
/// Number of ports.
pub(crate) const PORTS: u64 = 3;
/// `SLEEP_CONTROL_REG`.
pub(crate) const SLEEP_CONTROL_PORT: u16 = BASE_PORT;
/// `SLEEP_STATUS_REG`.
pub(crate) const SLEEP_STATUS_PORT: u16 = BASE_PORT + 1;
/// `RESET_REG`.
pub(crate) const RESET_PORT: u16 = BASE_PORT + 2;
/// What the guest writes to [`RESET_PORT`].
pub(crate) const RESET_VALUE: u8 = 1;
/// `SLP_TYP` of soft off.
pub(crate) const SLEEP_TYPE_S5: u8 = 5;

/// The three registers.
pub(crate) struct Power(pub(crate) StopHandle);

impl BusDevice for Power {
    fn read(&mut self, _offset: u64, data: &mut [u8]) {
        // The wake status is never set: nothing but a reset ends a sleep.
        data.fill(0);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        const SLEEP_ENABLE: u8 = 1 << 5;
        const SLEEP_TYPE_SHIFT: u8 = 2;
        let Some((&value, [])) = data.split_first() else { return };
        let Some(port) =
            u16::try_from(offset).ok().and_then(|offset| BASE_PORT.checked_add(offset))
        else {
            return;
        };
        match (port, value) {
            (SLEEP_CONTROL_PORT, value)
                if value & SLEEP_ENABLE != 0 && value >> SLEEP_TYPE_SHIFT & 7 == SLEEP_TYPE_S5 =>
            {
                self.0.end(GenerationEnd::PowerOff);
            }
            (RESET_PORT, RESET_VALUE) => self.0.end(GenerationEnd::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_right_values_end_the_machine() {
        let stop = StopHandle::default();
        let mut power = Power(stop.clone());
        for (offset, data) in
            [(0, vec![0]), (0, vec![5 << 2]), (0, vec![1 << 5]), (1, vec![1]), (2, vec![0, 1])]
        {
            power.write(offset, &data);
            assert!(!stop.is_ending(), "{offset} {data:?}");
        }
        power.write(0, &[1 << 5 | 5 << 2]);
        assert!(matches!(stop.take(), GenerationEnd::PowerOff));
        power.write(2, &[1]);
        assert!(matches!(stop.take(), GenerationEnd::Reset));
    }
}
