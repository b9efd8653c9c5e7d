// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Exits of vCPUs that carry hypercalls, or meet windows.

use kvm_ioctls::{Error, VcpuFd};
use kvmmem_sys::pio::PortData;

use super::port::on_doorbell;
use super::serve::Hypercalls;
use super::xen::on_xen_exit;
use crate::machine::introspector::IntrospectorExits;
use crate::status::ActiveMethod;

impl IntrospectorExits for Hypercalls {
    fn doorbell(&self, vcpu: &mut VcpuFd, data: &PortData) -> Result<(), Error> {
        match self.method() {
            ActiveMethod::Port => on_doorbell(vcpu, data, self).map(drop),
            ActiveMethod::Xen => Ok(()),
        }
    }

    fn hypercall(&self, vcpu: &mut VcpuFd) -> Result<bool, Error> {
        match self.method() {
            ActiveMethod::Xen => on_xen_exit(vcpu, self),
            ActiveMethod::Port => Ok(false),
        }
    }

    fn refuse_write(&self, gpa: u64) -> bool {
        Self::refuse_write(self, gpa)
    }
}
