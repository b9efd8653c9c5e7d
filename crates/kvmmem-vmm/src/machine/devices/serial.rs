// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The first serial port: an 8250 between the guest and the VMM's console.

use std::io;

use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_sys_util::eventfd::EventFd;

use super::bus::BusDevice;
use super::console::ConsoleOutput;
use crate::limit::warn_limited;

/// Number of ports.
pub(crate) const PORTS: u64 = 8;

/// The port's interrupt line.
struct Line(EventFd);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.write(1)
    }
}

/// The port.
pub(crate) struct SerialPort(Serial<Line, NoEvents, ConsoleOutput>);

impl SerialPort {
    pub(crate) fn new(line: EventFd, output: ConsoleOutput) -> Self {
        Self(Serial::new(Line(line), output))
    }

    /// Gives the guest as much of `input` as its FIFO takes, and returns how much that was.
    pub(crate) fn receive(&mut self, input: &[u8]) -> usize {
        let room = self.0.fifo_capacity().min(input.len());
        let Some(part) = input.get(..room).filter(|part| !part.is_empty()) else { return 0 };
        self.0.enqueue_raw_bytes(part).unwrap_or_else(|error| {
            warn_limited!(?error, "serial input was lost");
            part.len()
        })
    }
}

impl BusDevice for SerialPort {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset)) {
            *byte = self.0.read(offset);
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        if let ([byte], Ok(offset)) = (data, u8::try_from(offset))
            && let Err(error) = self.0.write(offset, *byte)
        {
            warn_limited!(?error, "serial output was lost");
        }
    }
}
