// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How many PCI slots an introspector has for views.

use kvmmem_proto::message::{Answer, Refusal};
use kvmmem_qemu::windows::machine::{self, MachineError};

use super::handle::Introspector;
use super::open::OpenError;
use crate::core::call_error::CallError;
use crate::service::Service;
use crate::sync::lock;

impl Introspector {
    /// How many PCI slots are free for views, and how many there are; retired ones are not free.
    ///
    /// # Errors
    /// [`OpenError::Ask`], where QEMU does not say.
    fn free_slots(&self) -> Result<(usize, usize), OpenError> {
        let mut qmp = self.monitor.lend().map_err(MachineError::from)?;
        let slots = machine::slots(&mut qmp)?;
        let free = self.free(&lock(&self.state), &slots, 0)?.len();
        let views = self.views();
        let taken: usize = views.iter().map(|view| lock(&view.slots).len()).sum();
        // `count` leaves out the taken slots of a bus that is not for views alone.
        Ok((free, slots.count.max(free + taken)))
    }
}

impl Service {
    /// How many PCI slots an introspector has for views.
    pub(crate) fn free_slots(&self, name: &str) -> Result<Answer, CallError> {
        let vm = self.broker().find_introspector(name)?;
        let added = vm.identity().cid.and_then(|cid| self.introspectors().by_cid(cid));
        let introspector = added.filter(|introspector| introspector.traits.vm == vm.id());
        let introspector = introspector.ok_or_else(|| {
            CallError::new(Refusal::Denied, format!("{name:?} was not added as an introspector"))
        })?;
        let (free, count) = introspector.free_slots()?;
        let number = |count| u32::try_from(count).unwrap_or(u32::MAX);
        let retired = lock(&introspector.state).retired.buses();
        Ok(Answer::FreeSlots { free: number(free), count: number(count), retired })
    }
}
