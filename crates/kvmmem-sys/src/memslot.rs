// SPDX-License-Identifier: Apache-2.0 OR MIT
//! KVM memory slots outside of a guest's RAM, which the program adds and deletes while the VM runs.
//!
//! Windows (`kvmmem-vmm`) show targets with them. The mapping of a slot lives as long as the guest
//! can reach it.

use std::io;
use std::sync::Arc;

use kvm_bindings::{KVM_MEM_READONLY, kvm_userspace_memory_region};
use kvm_ioctls::VmFd;

use crate::window::{Access, GuestMapping, MappingError, PoisonFile};

/// What can go wrong with a slot.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// KVM did not take the slot; the guest has a hole there.
    #[error("KVM refused memory slot {slot} at GPA {gpa:#x}, length {len:#x}")]
    Add {
        /// Number of the slot.
        slot: u32,
        /// Its first GPA.
        gpa: u64,
        /// Its length in bytes.
        len: u64,
        /// Why.
        source: io::Error,
    },
    /// KVM did not give the slot back; the guest reaches what it has reached before.
    #[error("KVM kept memory slot {slot} at GPA {gpa:#x}")]
    Delete {
        /// Number of the slot.
        slot: u32,
        /// Its first GPA.
        gpa: u64,
        /// Why.
        source: io::Error,
    },
}

/// A slot of a VM, and the mapping behind it, which stays as long as the guest can reach it. Both
/// end when dropped.
#[derive(Debug)]
pub struct Memslot {
    vm: Arc<VmFd>,
    slot: u32,
    gpa: u64,
    /// `None` once the slot is deleted.
    mapping: Option<GuestMapping>,
}

impl Memslot {
    /// Shows `mapping` to the guest at `gpa`. A guest that writes to a read-only one makes its vCPU
    /// exit with `KVM_EXIT_MMIO` and changes nothing.
    ///
    /// # Errors
    /// [`SlotError::Add`]; among other reasons because the number or the place is taken.
    pub fn add(
        vm: &Arc<VmFd>,
        slot: u32,
        gpa: u64,
        mapping: GuestMapping,
    ) -> Result<Self, SlotError> {
        let len = mapping.len();
        let region = kvm_userspace_memory_region {
            slot,
            flags: if mapping.access() == Access::ReadOnly { KVM_MEM_READONLY } else { 0 },
            guest_phys_addr: gpa,
            memory_size: len,
            userspace_addr: mapping.address(),
        };
        // SAFETY: userspace_addr and memory_size describe a live mapping that the result owns until
        // KVM has deleted the slot, so the guest never reaches anything else through it; no
        // reference to its contents exists. A slot that has this number already is not
        // changed: KVM moves no slot to another userspace_addr, and live mappings have
        // different ones.
        unsafe { vm.set_user_memory_region(region) }.map_err(|error| SlotError::Add {
            slot,
            gpa,
            len,
            source: error.into(),
        })?;
        Ok(Self { vm: vm.clone(), slot, gpa, mapping: Some(mapping) })
    }

    /// Takes the slot from the guest, which finds a hole there from then on, and returns what was
    /// behind it; `None` if it is deleted already.
    ///
    /// # Errors
    /// [`SlotError::Delete`].
    pub fn delete(&mut self) -> Result<Option<GuestMapping>, SlotError> {
        if self.mapping.is_none() {
            return Ok(None);
        }
        let gone = kvm_userspace_memory_region {
            slot: self.slot,
            guest_phys_addr: self.gpa,
            ..Default::default()
        };
        // SAFETY: a length of zero deletes a slot, which makes no memory reachable.
        unsafe { self.vm.set_user_memory_region(gone) }.map_err(|error| SlotError::Delete {
            slot: self.slot,
            gpa: self.gpa,
            source: error.into(),
        })?;
        Ok(self.mapping.take())
    }

    /// Puts `mapping` in the place of what is behind the slot, and returns the latter. In between
    /// the guest would find a hole: no vCPU may run meanwhile.
    ///
    /// # Errors
    /// [`SlotError::Delete`], and nothing has changed; [`SlotError::Add`], and the hole stays.
    pub fn replace(&mut self, mapping: GuestMapping) -> Result<Option<GuestMapping>, SlotError> {
        let before = self.delete()?;
        *self = Self::add(&self.vm.clone(), self.slot, self.gpa, mapping)?;
        Ok(before)
    }

    /// Puts poison in the place of what is behind the slot while the guest may run; slower than
    /// [`Memslot::replace`], since the old contents are unmapped first.
    ///
    /// # Errors
    /// [`MappingError::Map`].
    pub fn poison_in_place(&mut self, file: &PoisonFile) -> Result<(), MappingError> {
        self.mapping.as_mut().map_or(Ok(()), |mapping| mapping.poison_in_place(file))
    }

    /// Its number.
    pub fn slot(&self) -> u32 {
        self.slot
    }

    /// Its first GPA.
    pub fn gpa(&self) -> u64 {
        self.gpa
    }

    /// Its length in bytes, 0 once it is deleted.
    pub fn len(&self) -> u64 {
        self.mapping.as_ref().map_or(0, GuestMapping::len)
    }

    /// Whether it is deleted.
    pub fn is_empty(&self) -> bool {
        self.mapping.is_none()
    }

    /// What the guest may do with the memory behind it, `None` once it is deleted.
    pub fn access(&self) -> Option<Access> {
        self.mapping.as_ref().map(GuestMapping::access)
    }
}

impl Drop for Memslot {
    fn drop(&mut self) {
        if self.delete().is_err() {
            // The guest can still reach the mapping, so it must stay for good.
            std::mem::forget(self.mapping.take());
        }
    }
}
