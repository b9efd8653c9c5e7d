// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bare guests that KVM cannot run any further.

use kvmmem_vmm::{MachineError, VcpuError, VmmError};

use crate::fixture::{Target, has_kvm, run_with};
use crate::guest::Guest;

/// A page of the guest's own.
const SCRATCH: u64 = 0x50_0000;
/// Where neither RAM nor a device is.
const NOTHING: u64 = 0xd000_0000;

/// What ends the machine of `guest`.
fn failure(guest: &Guest) -> VmmError {
    run_with(guest, &Target::new(), |_| {}).err().unwrap()
}

#[test]
fn the_error_names_what_kvm_reported_where_and_the_next_step() {
    if !has_kvm() {
        return;
    }
    // The CPU finds no interrupt gate. An older kernel tries to emulate the instruction, and cannot
    // do that either.
    let undeliverable = Guest::default().load_interrupt_table(NOTHING, SCRATCH).breakpoint();
    let not_emulated = Guest::default().jump(NOTHING);
    for (guest, suberrors) in
        [(undeliverable, &["suberror 3", "suberror 1"][..]), (not_emulated, &["suberror 1"])]
    {
        let VmmError::Machine(MachineError::Vcpu(error)) = failure(&guest) else { panic!() };
        assert!(matches!(error, VcpuError::InternalError { id: 0, .. }));
        let text = error.to_string();
        assert!(suberrors.iter().any(|suberror| text.contains(suberror)), "{text}");
        // The CPU would deliver it again: such an instruction is not executed again.
        assert_eq!(text.contains("suberror 3"), text.contains("an event pending"), "{text}");
        assert!(text.contains("at rip 0x") && text.contains("restart the VM"), "{text}");
    }
}
