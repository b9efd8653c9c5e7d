// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bare guests on `/dev/kvm`: the machine's ends, and hypercalls by the doorbell against a fake
//! target. Skipped, with the reason, where `/dev/kvm` cannot be opened.
#![deny(unsafe_code)]

#[path = "bare/events.rs"]
mod events;
#[path = "bare/fixture.rs"]
mod fixture;
#[path = "bare/guest.rs"]
mod guest;
#[path = "bare/internal_errors.rs"]
mod internal_errors;
#[path = "bare/pauses.rs"]
mod pauses;
#[path = "bare/recorder.rs"]
mod recorder;
#[path = "bare/sandbox.rs"]
mod sandbox;
#[path = "bare/tokens.rs"]
mod tokens;
#[path = "bare/views.rs"]
mod views;
#[path = "bare/waits.rs"]
mod waits;

use kvmmem_abi::cpuid::{
    DESCRIPTOR_GSI, DOORBELL_PORT, FEATURE_DOORBELL, FEATURE_INTERRUPT, FEATURE_WINDOW,
    LEAF_FEATURES, LEAF_SIGNATURE, SIGNATURE_REGISTERS,
};
use kvmmem_abi::errno::KvmError;
use kvmmem_abi::hypercall::{MEM_MAP, MEM_UNMAP, UNMAP_ALL, UNMAP_ALL_KEEP, UNMAP_ALL_ZERO};
use kvmmem_vmm::{DiskConfig, HypercallMethod, ResetPolicy, VmConfig, VmExit, VmStatus, VmmError};

use fixture::{
    TARGET_HOLE, TOKEN, Target, has_kvm, has_windows, methods, refused, run, run_stopped, run_with,
    run_with_broker,
};
use guest::{Guest, Method, PAGE_DIRECTORY};

/// A page of the guest's own.
const OWN: u64 = 0x60_0000;
/// Where the guest keeps its token.
const TOKEN_AT: u64 = 0x50_0100;
/// A page of the target's.
const THERE: u64 = 0x4_2000;

/// A guest that knows its token.
fn guest(method: Method) -> Guest {
    Guest::calling(method).write_token(TOKEN_AT, TOKEN)
}

trait Calls {
    fn map(self, token: u64, target_gpa: u64, own_gpa: u64) -> Self;
    fn unmap(self, own_gpa: u64) -> Self;
}

impl Calls for Guest {
    fn map(self, token: u64, target_gpa: u64, own_gpa: u64) -> Self {
        self.call(MEM_MAP, [token, target_gpa, own_gpa])
    }

    fn unmap(self, own_gpa: u64) -> Self {
        self.call(MEM_UNMAP, [own_gpa, 0, 0])
    }
}

#[test]
fn a_machine_ends_as_its_guest_says() {
    if !has_kvm() {
        return;
    }
    let target = Target::new();
    assert_eq!(run(&Guest::default().power_off(), &target).exit, VmExit::PowerOff);
    assert_eq!(run(&Guest::default().reset(), &target).exit, VmExit::Reset);
    assert_eq!(run(&Guest::default().crash(), &target).exit, VmExit::TripleFault);
    assert_eq!(run(&Guest::default().jump_to_reset_vector(), &target).exit, VmExit::Reset);
}

#[test]
fn the_doorbell_is_told_by_cpuid() {
    if !has_kvm() {
        return;
    }
    let asks = Guest::default().cpuid(LEAF_SIGNATURE).cpuid(LEAF_FEATURES).power_off();
    let [ebx, ecx, edx] = SIGNATURE_REGISTERS.map(u64::from);
    let values = run(&asks, &Target::new()).values;
    let (windows, gsi) = match has_windows() {
        true => (FEATURE_WINDOW | FEATURE_INTERRUPT, u64::from(DESCRIPTOR_GSI)),
        false => (0, 0),
    };
    let features = u64::from(FEATURE_DOORBELL | windows) | u64::from(DOORBELL_PORT) << 32;
    assert_eq!(values, [u64::from(LEAF_FEATURES) | ebx << 32, ecx | edx << 32, features, gsi]);

    let plain = run_with(&asks, &Target::new(), |config| config.introspector = false).unwrap();
    assert_ne!(plain.values[1], values[1]);
}

#[test]
fn a_page_is_mapped_read_written_and_unmapped() {
    for method in methods() {
        let target = Target::new();
        target.write(THERE + 8, 0x5ec2e7);
        let outcome = run(
            &guest(method)
                .write(OWN + 8, 0x0dd)
                .map(TOKEN_AT, THERE, OWN)
                .report_memory(OWN + 8)
                .write(OWN + 16, 0xbeef)
                .unmap(OWN)
                .report_memory(OWN + 8)
                .report_memory(OWN + 16)
                .write(OWN + 16, 1)
                .report_memory(OWN + 16)
                .power_off(),
            &target,
        );
        // The page after the unmapping is zero: neither the target's nor what it was before.
        assert_eq!(outcome.values, [0, 0x5ec2e7, 0, 0, 0, 1]);
        assert_eq!(target.read(THERE + 16), 0xbeef);
        assert_eq!(outcome.asked, 1);
    }
}

#[test]
fn all_pages_come_back_at_once() {
    for method in methods() {
        for (content, left) in [(UNMAP_ALL_ZERO, 0), (UNMAP_ALL_KEEP, 0x5ec2e7)] {
            let target = Target::new();
            target.write(THERE + 8, 0x5ec2e7);
            let outcome = run(
                &guest(method)
                    .map(TOKEN_AT, THERE, OWN)
                    .call(UNMAP_ALL, [content, 0, 0])
                    .report_memory(OWN + 8)
                    .write(OWN + 8, 7)
                    .report_memory(OWN + 8)
                    .unmap(OWN)
                    .call(UNMAP_ALL, [content, 0, 0])
                    .call(UNMAP_ALL, [2, 0, 0])
                    .power_off(),
                &target,
            );
            let (gone, invalid) = (refused(KvmError::NoEnt), refused(KvmError::Inval));
            assert_eq!(outcome.values, [0, 0, left, 7, gone, 0, invalid]);
            assert_eq!(target.read(THERE + 8), 0x5ec2e7);
        }
    }
}

#[test]
fn a_token_may_lie_in_two_pages_apart() {
    for method in methods() {
        const LARGE_PRESENT_WRITABLE: u64 = 0x83;
        const ELSEWHERE: u64 = 0x80_0000;
        const BORDER: u64 = 0x40_0000;
        let target = Target::new();
        target.write(THERE, 7);
        let outcome = run(
            &Guest::calling(method)
                .write(PAGE_DIRECTORY + 8 * 2, ELSEWHERE | LARGE_PRESENT_WRITABLE)
                .write_token(BORDER - 16, TOKEN)
                .map(BORDER - 16, THERE, OWN)
                .report_memory(OWN)
                // The second half is where the page tables say, not behind the first.
                .report_memory(ELSEWHERE)
                .power_off(),
            &target,
        );
        assert_eq!(outcome.values, [0, 7, TOKEN[2]]);
    }
}

#[test]
fn refusals_name_their_reason_and_spare_the_token() {
    for method in methods() {
        const BEYOND_RAM: u64 = 64 << 20;
        const UNMAPPED_GVA: u64 = 1 << 40;
        const MMIO: u64 = 0xd000_0000;
        let cases: [(&str, Guest, KvmError); 9] = [
            ("own GPA unaligned", guest(method).map(TOKEN_AT, THERE, OWN + 1), KvmError::Inval),
            ("own GPA beyond RAM", guest(method).map(TOKEN_AT, THERE, BEYOND_RAM), KvmError::Inval),
            ("own GPA in the PCI hole", guest(method).map(TOKEN_AT, THERE, MMIO), KvmError::Inval),
            ("own GPA at the top", guest(method).map(TOKEN_AT, THERE, !0xfff), KvmError::Inval),
            ("target GPA unaligned", guest(method).map(TOKEN_AT, THERE + 8, OWN), KvmError::Inval),
            ("token not mapped", guest(method).map(UNMAPPED_GVA, THERE, OWN), KvmError::Fault),
            ("token in a hole", guest(method).map(MMIO, THERE, OWN), KvmError::Fault),
            ("unmap of an own page", guest(method).unmap(OWN), KvmError::NoEnt),
            ("unknown number", guest(method).call(12, [0; 3]), KvmError::NoSys),
        ];
        let target = Target::new();
        for (name, case, error) in cases {
            let outcome = run(&case.power_off(), &target);
            assert_eq!(outcome.values, [refused(error)], "{name}");
            assert_eq!(outcome.asked, 0, "{name}");
        }
    }
}

#[test]
fn a_token_of_the_brokers_is_good_once() {
    for method in methods() {
        let target = Target::new();
        target.write(THERE, 0x5ec2e7);
        let make = |token| {
            Guest::calling(method)
                .write_token(TOKEN_AT, token)
                .map(TOKEN_AT, THERE, OWN)
                .report_memory(OWN)
                .map(TOKEN_AT, THERE, OWN + 0x1000)
                .power_off()
        };
        let outcome = run_with_broker(&target, 1, make, |_, _| {});
        assert_eq!(outcome.values, [0, 0x5ec2e7, refused(KvmError::NoEnt)]);
    }
}

#[test]
fn refusals_by_the_target_leave_the_own_page() {
    for method in methods() {
        let target = Target::new();
        let outcome = run(
            &guest(method)
                .write(OWN, 0x600d)
                .write_token(TOKEN_AT + 64, [0; 4])
                .map(TOKEN_AT + 64, THERE, OWN)
                .map(TOKEN_AT, TARGET_HOLE, OWN)
                .map(TOKEN_AT, 1 << 40, OWN)
                .report_memory(OWN)
                .map(TOKEN_AT, THERE, OWN)
                .map(TOKEN_AT, THERE, OWN)
                .unmap(OWN)
                .unmap(OWN)
                .power_off(),
            &target,
        );
        let [no_entry, fault, busy] =
            [KvmError::NoEnt, KvmError::Fault, KvmError::Busy].map(refused);
        assert_eq!(outcome.values, [no_entry, fault, fault, 0x600d, 0, busy, 0, no_entry]);
        assert_eq!(outcome.asked, 4);
    }
}

#[test]
fn user_mode_may_not_call() {
    for method in methods() {
        const SCRATCH: u64 = 0x3_0000;
        let outcome = run(
            &Guest::calling(method)
                .write_token(0x3_1000, TOKEN)
                .drop_to_user(SCRATCH)
                .map(0x3_1000, THERE, OWN)
                .unmap(OWN)
                .power_off(),
            &Target::new(),
        );
        assert_eq!(outcome.exit, VmExit::PowerOff);
        assert_eq!(outcome.values, [refused(KvmError::Perm); 2]);
        assert_eq!(outcome.asked, 0);
    }
}

#[test]
fn a_flood_of_bad_calls_ends_and_the_next_good_one_works() {
    for method in methods() {
        let target = Target::new();
        target.write(THERE, 9);
        let outcome = run(
            &guest(method)
                .repeat(20_000, |guest| {
                    guest
                        .ring(u64::MAX, [u64::MAX; 3])
                        .ring(MEM_MAP, [u64::MAX; 3])
                        .ring(MEM_UNMAP, [OWN; 3])
                })
                .map(TOKEN_AT, THERE, OWN)
                .report_memory(OWN)
                .power_off(),
            &target,
        );
        assert_eq!(outcome.values, [0, 9]);
    }
}

#[test]
fn a_host_without_the_xen_way_says_so() {
    if !has_kvm() || methods().contains(&Method::Vmmcall) {
        return;
    }
    let xen = run_with(&Guest::calling(Method::Vmmcall).power_off(), &Target::new(), |_| {});
    assert!(matches!(xen, Err(VmmError::NoXen(_))));
    let auto = run_with(&Guest::calling(Method::Vmmcall).power_off(), &Target::new(), |config| {
        config.hypercalls = HypercallMethod::Auto;
    });
    assert_eq!(auto.unwrap().exit, VmExit::PowerOff);
}

#[test]
fn a_reset_starts_anew_without_the_mappings() {
    const STAGE: u64 = 0x61_0000;
    const STAGE_PAGE: u64 = 0x4_3000;
    for method in methods() {
        let target = Target::new();
        target.write(THERE, 0x5ec2e7);
        // A page of the target's is where the guest keeps, over the reset, how far it got.
        let outcome = run_with(
            &guest(method)
                .map(TOKEN_AT, THERE, OWN)
                .map(TOKEN_AT, STAGE_PAGE, STAGE)
                .report_memory(OWN)
                .skip_if_zero(STAGE, |guest| {
                    guest.unmap(STAGE).unmap(OWN).report_memory(OWN).power_off()
                })
                .write(STAGE, 1)
                .reset(),
            &target,
            |config| config.reset = ResetPolicy::Restart,
        )
        .unwrap();
        let secret = 0x5ec2e7;
        assert_eq!(outcome.values, [0, 0, secret, 0, 0, secret, 0, 0, 0]);
        assert_eq!(outcome.exit, VmExit::PowerOff);
        let exited = VmStatus::Exited { reason: VmExit::PowerOff };
        assert!(
            matches!(&outcome.events[..], [VmStatus::Started { .. }, VmStatus::Restarted, end] if *end == exited)
        );
    }
}

#[test]
fn a_guest_that_never_ends_is_stopped() {
    if !has_kvm() {
        return;
    }
    let begun = || Guest::default().report_memory(0);
    for idle in [begun().halt(), begun().spin()] {
        assert_eq!(run_stopped(&idle), VmExit::Stopped);
    }
}

type Change = fn(&mut VmConfig);

#[test]
fn bad_configurations_are_refused_with_a_reason() {
    if !has_kvm() {
        return;
    }
    let cases: [(&str, Change); 6] = [
        ("vCPUs", |config| config.vcpus = 0),
        ("vCPUs", |config| config.vcpus = 65),
        ("too little", |config| config.memory_bytes = 4096),
        ("CID", |config| config.cid = Some(2)),
        ("disk", |config| {
            config.disks = vec![DiskConfig { path: "/nonexistent/disk".into(), read_only: true }];
        }),
        ("broker", |config| config.broker = Some("/nonexistent/socket".into())),
    ];
    for (word, change) in cases {
        let error = run_with(&Guest::default().power_off(), &Target::new(), change).err().unwrap();
        assert!(error.to_string().contains(word), "{error}");
    }
}
