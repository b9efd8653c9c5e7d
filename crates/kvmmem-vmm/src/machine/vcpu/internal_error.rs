// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Internal errors of KVM (`KVM_EXIT_INTERNAL_ERROR`): all but one kind end the machine.
//!
//! `KVM_INTERNAL_ERROR_DELIVERY_EV` means that the delivery of an event touched memory that KVM
//! would have to emulate. The event stays pending, so the next entry would fail in the same way.
//!
//! QEMU's emulation of SVM makes KVM report one where no event is pending. QEMU records an
//! exception that the guest handles in EVENTINJ and then clears its valid bit alone
//! (`do_interrupt_all`), and `do_vmexit` copies the rest to EXITINTINFO. Linux's
//! `svm_check_emulate_instruction` looks at the type there, not at the valid bit. So a store to a
//! read-only memory slot, or a load where there is none, fails where it is the first exit after a
//! page fault, say. The exit has cleared EVENTINJ: executed again, it succeeds. Seen with QEMU 7.2
//! and Linux 7.3; Linux 6.12 does not have the check.

use std::fmt;

use kvm_bindings::{
    KVM_INTERNAL_ERROR_DELIVERY_EV, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_SIMUL_EX,
    KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON, kvm_vcpu_events,
};
use kvmmem_sys::internal_error::InternalError;

/// An internal error of KVM, and where the vCPU was.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KvmFault {
    /// What KVM reported.
    pub(super) error: InternalError,
    /// The guest's instruction pointer.
    pub(super) rip: u64,
    /// Whether KVM would deliver an event at the next entry.
    pub(super) is_event_pending: bool,
}

impl KvmFault {
    pub(super) fn new(error: InternalError, rip: u64, events: &kvm_vcpu_events) -> Self {
        let injected = [events.exception.injected, events.interrupt.injected, events.nmi.injected];
        Self { error, rip, is_event_pending: injected != [0; 3] }
    }

    /// Whether KVM saw the delivery of an event where there was none.
    fn is_false_delivery(&self) -> bool {
        self.error.suberror == KVM_INTERNAL_ERROR_DELIVERY_EV && !self.is_event_pending
    }
}

impl fmt::Display for KvmFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let InternalError { suberror, data } = &self.error;
        let what = match *suberror {
            KVM_INTERNAL_ERROR_EMULATION => "an instruction that KVM cannot emulate",
            KVM_INTERNAL_ERROR_SIMUL_EX => "an exception during another one",
            KVM_INTERNAL_ERROR_DELIVERY_EV => "an event that KVM cannot deliver",
            KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON => "an exit that KVM does not know",
            _ => "unknown",
        };
        let event = if self.is_event_pending { "an event pending" } else { "no event pending" };
        write!(f, "suberror {suberror} ({what}) at rip {:#x}, {event}, data", self.rip)?;
        data.iter().try_for_each(|word| write!(f, " {word:#x}"))
    }
}

/// Counts the false deliveries that follow each other.
#[derive(Debug, Default)]
pub(super) struct FalseDeliveries(u8);

impl FalseDeliveries {
    /// How many may follow each other. One is followed by another only if an exception hits the
    /// same instruction again.
    const MOST: u8 = 16;

    /// Whether the guest may execute the instruction of `fault` again.
    pub(super) fn allow(&mut self, fault: &KvmFault) -> bool {
        let is_allowed = fault.is_false_delivery() && self.0 < Self::MOST;
        self.0 += u8::from(is_allowed);
        is_allowed
    }

    /// Records an exit of another kind: the guest got on.
    pub(super) fn reset(&mut self) {
        self.0 = 0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(suberror: u32, is_event_pending: bool) -> KvmFault {
        KvmFault {
            error: InternalError { suberror, data: vec![0x4_0000_0000, 0x400] },
            rip: 0x20_0000,
            is_event_pending,
        }
    }

    #[test]
    fn false_deliveries_alone_are_survived() {
        for suberror in 0..=u8::MAX {
            for is_event_pending in [false, true] {
                let is_false =
                    u32::from(suberror) == KVM_INTERNAL_ERROR_DELIVERY_EV && !is_event_pending;
                let allowed =
                    FalseDeliveries::default().allow(&fault(suberror.into(), is_event_pending));
                assert_eq!(
                    allowed, is_false,
                    "suberror {suberror}, event pending: {is_event_pending}"
                );
            }
        }
    }

    #[test]
    fn a_row_of_false_deliveries_ends_and_progress_begins_a_new_one() {
        let delivery = fault(KVM_INTERNAL_ERROR_DELIVERY_EV, false);
        let mut row = FalseDeliveries::default();
        let allowed = (0..1000).filter(|_| row.allow(&delivery)).count();
        assert_eq!(allowed, usize::from(FalseDeliveries::MOST));
        row.reset();
        assert!(row.allow(&delivery));
    }

    #[test]
    fn each_kind_of_event_counts_as_pending() {
        let none = kvm_vcpu_events::default();
        let mut all = [none; 3];
        all[0].exception.injected = 1;
        all[1].interrupt.injected = 1;
        all[2].nmi.injected = 1;
        let error = fault(KVM_INTERNAL_ERROR_DELIVERY_EV, false).error;
        assert!(!KvmFault::new(error.clone(), 0, &none).is_event_pending);
        assert!(all.iter().all(|events| KvmFault::new(error.clone(), 0, events).is_event_pending));
    }
}
