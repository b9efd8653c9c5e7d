// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What happens to bare guests' views without their doing.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem_abi::cpuid::DESCRIPTOR_GSI;
use kvmmem_abi::errno::KvmError;
use kvmmem_abi::hypercall::{ATTACH, DETACH, MEM_MAP, MEM_UNMAP, SEEK, SEEK_DATA};
use kvmmem_abi::native::{RIGHT_READ, RIGHT_WRITE, STATE_GONE, STATE_OPEN, STATE_REVOKED};
use kvmmem_client::admin::Admin;
use kvmmem_client::vmm::{Rights, Scope};
use kvmmem_vmm::introspect::source::{TargetEvents, TargetMemory};
use kvmmem_vmm::{ResetPolicy, VmExit};

use crate::fixture::{
    TOKEN, Target, refused, run_with_broker, run_with_tokens, wait_until, window_methods,
};
use crate::guest::{Guest, Method};
use crate::tokens::OneToken;
use crate::views::{Calls, DESCRIPTOR, FIRST, POSITION, REQUEST, RESULT, THERE, guest, secret};

/// Calls `event` on the machine's views once the guest has searched one.
fn when_searched(tokens: &OneToken, event: impl FnOnce(&dyn TargetEvents)) {
    // The loop that the event ends is right behind the search.
    wait_until(|| !tokens.state().told.is_empty());
    event(&*tokens.events());
}

type Event = fn(&dyn TargetEvents);

#[test]
fn revoked_memory_turns_into_poison_while_the_guest_uses_it() {
    const PAGE: u64 = 0x60_0000;
    let cases: [(&str, Event, u32); 3] = [
        ("revoked", |events| assert!(events.revoke(1)), STATE_REVOKED),
        ("gone", |events| events.gone(1), STATE_GONE),
        ("lost", |events| events.lost(), STATE_GONE),
    ];
    for (method, rights) in window_methods()
        .into_iter()
        .flat_map(|method| [(method, Rights::ReadOnly), (method, Rights::ReadWrite)])
    {
        for (name, event, state) in cases {
            let (target, tokens) = secret(rights);
            let bits =
                if rights == Rights::ReadOnly { RIGHT_READ } else { RIGHT_READ | RIGHT_WRITE };
            let words = |state: u32| u64::from(state) | u64::from(bits) << 32;
            let program = guest(method)
                .attach()
                .report_memory(FIRST + THERE)
                .ring(SEEK, [DESCRIPTOR, POSITION, SEEK_DATA])
                .touch_while(
                    DESCRIPTOR + 24,
                    words(STATE_OPEN),
                    FIRST + THERE,
                    rights == Rights::ReadWrite,
                )
                .report_memory(DESCRIPTOR + 24)
                .report_memory(FIRST + THERE)
                .report_memory(FIRST)
                // It may write on, where it could before, and sees what it has written.
                .write(FIRST + 0x1000, 0xbad)
                .report_memory(FIRST + 0x1000)
                .seek(DESCRIPTOR, 0, SEEK_DATA)
                .write(PAGE, 5)
                .report_memory(PAGE)
                .detach(DESCRIPTOR)
                .report_memory(DESCRIPTOR)
                .attach()
                .report_memory(FIRST + THERE)
                .power_off();
            let outcome = std::thread::scope(|scope| {
                scope.spawn(|| when_searched(&tokens, event));
                run_with_tokens(&program, &tokens, |_| {}).unwrap()
            });
            let kept = if rights == Rights::ReadOnly { 0 } else { 0xbad };
            let ended = refused(KvmError::Perm);
            assert_eq!(
                outcome.values,
                [0, 0x5ec2e7, words(state), 0, 0, kept, ended, 0, 5, 0, 0, 0, 0x5ec2e7],
                "{name} {rights}"
            );
            assert_eq!(outcome.exit, VmExit::PowerOff, "{name}");
            assert_eq!(target.read(0x1000), 0, "{name}");
            // Its number may mean another view by now.
            let ends = tokens
                .state()
                .told
                .iter()
                .filter(|(view, _, is_end)| *is_end && *view == 1)
                .count();
            assert_eq!(ends, 0, "{name}");
        }
    }
}

/// Where two CPUs tell each other how far they are.
const SIGN: u64 = 0x50_0800;
const STARTED: u64 = SIGN + 8;

#[test]
fn two_cpus_open_and_close_views_at_once_and_one_of_them_loses_one() {
    const OTHER_REQUEST: u64 = 0x51_0200;
    const OTHER_RESULT: u64 = 0x51_0300;
    for method in window_methods() {
        let (_, tokens) = secret(Rights::ReadOnly);
        let open = u64::from(STATE_OPEN) | u64::from(RIGHT_READ) << 32;
        let program = guest(method)
            .write_token(OTHER_REQUEST, TOKEN)
            .attach()
            .second_cpu(|other| {
                // The first view is this CPU's: it reads until that is revoked, and opens and
                // closes others then.
                other
                    .write(STARTED, 1)
                    .touch_while(DESCRIPTOR + 24, open, FIRST + THERE, false)
                    .repeat(300, |other| {
                        other
                            .ring(ATTACH, [OTHER_REQUEST, OTHER_RESULT, 0])
                            .ring(DETACH, [DESCRIPTOR + 0x1000, 0, 0])
                            .ring(DETACH, [DESCRIPTOR + 0x2000, 0, 0])
                    })
                    .write(SIGN, 1)
            })
            .touch_while(STARTED, 0, FIRST + THERE, false)
            .ring(SEEK, [DESCRIPTOR, POSITION, SEEK_DATA])
            .repeat(300, |guest| {
                guest.ring(ATTACH, [REQUEST, RESULT, 0]).ring(DETACH, [DESCRIPTOR + 0x1000, 0, 0])
            })
            .touch_while(SIGN, 0, FIRST + THERE, false)
            .report_memory(FIRST + THERE)
            .detach(DESCRIPTOR)
            .attach()
            .report_memory(RESULT)
            .report_memory(RESULT + 8)
            .power_off();
        let outcome = std::thread::scope(|scope| {
            scope.spawn(|| when_searched(&tokens, |events| assert!(events.revoke(1))));
            run_with_tokens(&program, &tokens, |config| config.vcpus = 2).unwrap()
        });
        assert_eq!(outcome.values, [0, 0, 0, 0, DESCRIPTOR, FIRST]);
        assert_eq!(outcome.exit, VmExit::PowerOff);
        // The revoked one is not reported.
        assert_eq!(tokens.state().open.keys().copied().collect::<Vec<_>>(), [1]);
    }
}

#[test]
fn a_call_that_is_made_again_stores_nothing_once_a_revocation_has_returned() {
    const GO: u64 = 0x2000;
    const STORED: u64 = 0x1000;
    if !window_methods().contains(&Method::Doorbell) {
        return;
    }
    for _ in 0..50 {
        let (target, tokens) = secret(Rights::ReadWrite);
        let program = guest(Method::Doorbell)
            .attach()
            .touch_while(FIRST + GO, 0, FIRST + THERE, false)
            .ring_into(ATTACH, [REQUEST, RESULT], FIRST + STORED)
            .power_off();
        let outcome = std::thread::scope(|scope| {
            scope.spawn(|| {
                wait_until(|| tokens.asked() == 1);
                tokens.be_silent();
                target.write(GO, 1);
                // From now on it makes the call again and again.
                wait_until(|| tokens.asked() == 2);
                assert!(tokens.events().revoke(1));
                target.write(STORED, 0);
                tokens.speak();
            });
            run_with_tokens(&program, &tokens, |_| {}).unwrap()
        });
        assert_eq!(outcome.exit, VmExit::PowerOff);
        assert_eq!(target.read(STORED), 0);
    }
}

#[test]
fn an_interrupt_says_that_a_descriptor_has_changed() {
    let events: [(Event, u32); 2] =
        [(|events| assert!(events.revoke(1)), STATE_REVOKED), (|events| events.lost(), STATE_GONE)];
    for method in window_methods() {
        for (event, state) in events {
            let (_, tokens) = secret(Rights::ReadOnly);
            let program = guest(method)
                .route(DESCRIPTOR_GSI)
                .attach()
                .ring(SEEK, [DESCRIPTOR, POSITION, SEEK_DATA])
                .wait_for_interrupt()
                .report_memory(DESCRIPTOR + 24)
                .power_off();
            let outcome = std::thread::scope(|scope| {
                scope.spawn(|| when_searched(&tokens, event));
                run_with_tokens(&program, &tokens, |_| {}).unwrap()
            });
            let seen = u64::from(state) | u64::from(RIGHT_READ) << 32;
            assert_eq!(outcome.values, [0, seen]);
        }
    }
}

#[test]
fn a_reset_closes_all_views() {
    const STAGE: u64 = 0x61_0000;
    for method in window_methods() {
        let (_, tokens) = secret(Rights::ReadWrite);
        // The target's memory is where the guest keeps, over the reset, how far it got.
        let program = guest(method)
            .write(STAGE, 0)
            .report_memory(DESCRIPTOR)
            .attach()
            .attach()
            .report_memory(FIRST + THERE)
            .skip_if_zero(FIRST + 0x1000, Guest::power_off)
            .write(FIRST + 0x1000, 1)
            .reset();
        let outcome =
            run_with_tokens(&program, &tokens, |config| config.reset = ResetPolicy::Restart)
                .unwrap();
        assert_eq!(outcome.values, [0, 0, 0, 0x5ec2e7].repeat(2));
        let state = tokens.state();
        assert!(state.open.is_empty());
        assert_eq!(state.told.iter().filter(|(_, _, is_end)| *is_end).count(), 4);
    }
}

#[test]
fn a_view_follows_its_target() {
    const MIB: u64 = 1 << 20;
    for method in window_methods() {
        let target = Target::with_ranges(8 * MIB, &[(0, MIB), (2 * MIB, 3 * MIB)]);
        let [low, high, new] = [0x3000, 2 * MIB, 6 * MIB - 0x1000];
        for gpa in [low, high] {
            target.write(gpa, gpa);
        }
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadOnly));
        let changed = target.with_other_ranges(&[(0, MIB), (4 * MIB, 6 * MIB)]);
        changed.write(new, new);
        let range = |index: u64, field: u64| DESCRIPTOR + 128 + 32 * index + 8 * field;
        let report_ranges = |guest: Guest| {
            let guest = guest.report_memory(DESCRIPTOR + 16).report_memory(DESCRIPTOR + 96);
            (0..2).fold(guest, |guest, index| {
                (0..3).fold(guest, |guest, field| guest.report_memory(range(index, field)))
            })
        };
        let program = report_ranges(guest(method).attach())
            .report_memory(FIRST + MIB)
            .ring(SEEK, [DESCRIPTOR, POSITION, SEEK_DATA])
            .touch_while(DESCRIPTOR + 16, 2, FIRST + MIB, false);
        let program = report_ranges(program)
            .report_memory(FIRST + low)
            .report_memory(FIRST + MIB)
            .report_memory(FIRST + 4 * MIB - 0x1000)
            .detach(DESCRIPTOR)
            .power_off();
        let outcome = std::thread::scope(|scope| {
            scope.spawn(|| {
                when_searched(&tokens, |views| {
                    let changed: Arc<dyn TargetMemory> = changed.clone();
                    views.memory_changed(&changed);
                });
            });
            run_with_tokens(&program, &tokens, |_| {}).unwrap()
        });
        let before = [0, 2, 2, 0, MIB, 0, 2 * MIB, MIB, MIB, high];
        // The range that is gone is poison, the new one is behind it where large pages stay large,
        // the other as it was.
        let after = [4, 2, 0, MIB, 0, 4 * MIB, 2 * MIB, 2 * MIB, low, 0, new, 0];
        assert_eq!(outcome.values, [before.as_slice(), &after].concat());
    }
}

#[test]
fn what_the_broker_takes_back_ends_at_once_pages_included() {
    const OWN: u64 = 0x60_0000;
    const PAGE_TOKEN: u64 = 0x50_0a00;
    for method in window_methods() {
        let target = Target::new();
        target.write(THERE, 0x5ec2e7);
        let open = u64::from(STATE_OPEN) | u64::from(RIGHT_READ | RIGHT_WRITE) << 32;
        let make = |token| {
            guest(method)
                .write_token(REQUEST, token)
                .write_token(PAGE_TOKEN, token)
                .attach()
                // The grant is for two uses.
                .call(MEM_MAP, [PAGE_TOKEN, THERE, OWN])
                .report_memory(FIRST + THERE)
                .report_memory(OWN)
                .ring(SEEK, [DESCRIPTOR, POSITION, SEEK_DATA])
                .touch_while(DESCRIPTOR + 24, open, FIRST + THERE, true)
                .report_memory(DESCRIPTOR + 24)
                .report_memory(FIRST + THERE)
                // The page is revoked just after the views.
                .touch_while(OWN, 0x5ec2e7, FIRST + THERE, false)
                .report_memory(OWN)
                .call(MEM_UNMAP, [OWN, 0, 0])
                .detach(DESCRIPTOR)
                .attach()
                .power_off()
        };
        let outcome = run_with_broker(&target, 2, make, |admin, grant| {
            let seeks = |admin: &mut Admin| {
                let grants = admin.grants().unwrap();
                let views = &grants.iter().find(|info| info.id == grant).unwrap().views;
                views.iter().map(|view| view.counters.seeks).sum::<u64>()
            };
            let deadline = Instant::now() + Duration::from_secs(60);
            while seeks(admin) == 0 {
                assert!(Instant::now() < deadline, "the guest searches nothing");
                std::thread::sleep(Duration::from_millis(1));
            }
            let revoked = admin.revoke(grant).unwrap();
            assert_eq!((revoked.views, revoked.unconfirmed), (1, 0));
        });
        let words = u64::from(STATE_REVOKED) | (open >> 32 << 32);
        let unknown = refused(KvmError::NoEnt);
        assert_eq!(outcome.values, [0, 0, 0x5ec2e7, 0x5ec2e7, words, 0, 0, 0, 0, unknown]);
    }
}
