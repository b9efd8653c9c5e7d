// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Exits of vCPUs that carry hypercalls, or meet windows.

use kvm_ioctls::{Error, VcpuFd};
use kvmmem_sys::pio::PortData;

use super::port::on_doorbell;
use super::serve::Hypercalls;
use super::xen::on_xen_exit;
use crate::machine::introspector::{IntrospectorExits, Served};
use crate::status::ActiveMethod;

impl IntrospectorExits for Hypercalls {
    fn doorbell(&self, id: u8, vcpu: &mut VcpuFd, data: &PortData) -> Result<Served, Error> {
        match self.method() {
            ActiveMethod::Port => on_doorbell(id, vcpu, data, self),
            ActiveMethod::Xen => Ok(Served::No),
        }
    }

    fn hypercall(&self, id: u8, vcpu: &mut VcpuFd) -> Result<Served, Error> {
        match self.method() {
            ActiveMethod::Xen => on_xen_exit(id, vcpu, self),
            ActiveMethod::Port => Ok(Served::No),
        }
    }

    fn refuse_write(&self, gpa: u64) -> bool {
        Self::refuse_write(self, gpa)
    }
}
