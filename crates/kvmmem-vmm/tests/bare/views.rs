// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bare guests that open views.

use std::sync::Arc;
use std::time::Duration;

use kvmmem_abi::descriptor::MAGIC;
use kvmmem_abi::errno::KvmError;
use kvmmem_abi::hypercall::{ATTACH, DETACH, MEM_MAP, MEM_UNMAP, SEEK, SEEK_DATA, SEEK_HOLE};
use kvmmem_abi::native::{ATTACH_READ_ONLY, RIGHT_READ, RIGHT_WRITE, STATE_GONE, STATE_OPEN, STATE_REVOKED};
use kvmmem_broker::admin::Admin;
use kvmmem_broker::link::{Rights, Scope, ViewCounters};
use kvmmem_vmm::mapping::{TargetMemory, Views};
use kvmmem_vmm::{ResetPolicy, VmExit};

use crate::fixture::{
    TARGET_HOLE, TOKEN, Target, has_windows, refused, run_with_broker, run_with_tokens, ways,
};
use crate::guest::{Guest, WINDOW, Way};
use crate::tokens::OneToken;

/// Where the guest keeps its request and finds the result.
const REQUEST: u64 = 0x50_0200;
const RESULT: u64 = 0x50_0300;
const POSITION: u64 = 0x50_0400;
/// The first view's descriptor page and its part of the window.
const DESCRIPTOR: u64 = WINDOW;
const FIRST: u64 = WINDOW + (2 << 20);
/// A page of the target's.
const THERE: u64 = 0x4_2000;

/// A guest that sees windows and knows its token.
fn guest(way: Way) -> Guest {
    Guest::calling(way)
        .see_windows(0x7_0000)
        .write_token(REQUEST, TOKEN)
        .write(REQUEST + 32, 1000 << 32 | 42)
        .write(REQUEST + 40, u64::from_le_bytes(*b"tool\0\0\0\0"))
}

trait Calls {
    fn attach(self) -> Self;
    fn detach(self, descriptor: u64) -> Self;
    fn seek(self, descriptor: u64, from: u64, what: u64) -> Self;
}

impl Calls for Guest {
    fn attach(self) -> Self {
        self.call(ATTACH, [REQUEST, RESULT, 0])
    }
    fn detach(self, descriptor: u64) -> Self {
        self.call(DETACH, [descriptor, 0, 0])
    }
    /// Reports where it came to.
    fn seek(self, descriptor: u64, from: u64, what: u64) -> Self {
        self.write(POSITION, from).call(SEEK, [descriptor, POSITION, what]).report_memory(POSITION)
    }
}

#[test]
fn a_view_is_attached_read_and_detached() {
    if !has_windows() {
        return;
    }
    for way in ways() {
        let target = Target::new();
        target.write(THERE, 0x5ec2e7);
        target.write(0x8_1000, 0xb0b);
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadOnly));
        let program = guest(way)
            .attach()
            .report_memory(RESULT)
            .report_memory(RESULT + 8)
            .report_memory(RESULT + 16)
            .report_memory(DESCRIPTOR)
            .report_memory(DESCRIPTOR + 16)
            .report_memory(DESCRIPTOR + 24)
            .report_memory(DESCRIPTOR + 64)
            .report_memory(FIRST + THERE)
            // The second range of the target is right behind the first one in the window.
            .report_memory(FIRST + 0x8_0000)
            .detach(DESCRIPTOR)
            .detach(DESCRIPTOR)
            .report_memory(DESCRIPTOR)
            // A hole by now: nothing is there, but nothing happens either.
            .report_memory(FIRST + THERE)
            .power_off();
        let outcome = run_with_tokens(&program, &tokens, |_| {}).unwrap();
        let state_and_rights = u64::from(STATE_OPEN) | u64::from(RIGHT_READ) << 32;
        let uuid = u64::from_le_bytes(*b"a target");
        let len = 0x10_0000 - 0x1000;
        assert_eq!(
            outcome.values,
            [
                0,
                DESCRIPTOR,
                FIRST,
                len,
                MAGIC,
                2,
                state_and_rights,
                uuid,
                0x5ec2e7,
                0xb0b,
                0,
                refused(KvmError::NoEnt),
                0,
                u64::MAX
            ]
        );
        assert_eq!(outcome.exit, VmExit::PowerOff);
        assert_eq!(tokens.state().told, [(1, ViewCounters::default(), true)]);
    }
}

#[test]
fn writing_to_a_read_only_view_changes_nothing_and_is_counted() {
    if !has_windows() {
        return;
    }
    for way in ways() {
        let target = Target::new();
        target.write(THERE, 0x5ec2e7);
        // The grant would allow more than the guest asks for.
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadWrite));
        let program = guest(way)
            .write(REQUEST + 56, ATTACH_READ_ONLY.into())
            .attach()
            .write(FIRST + THERE, 1)
            .write(FIRST + THERE + 0x1000, 1)
            .write(DESCRIPTOR + 24, 0)
            .report_memory(FIRST + THERE)
            .report_memory(DESCRIPTOR + 24)
            .detach(DESCRIPTOR)
            .power_off();
        let outcome = run_with_tokens(&program, &tokens, |_| {}).unwrap();
        let state_and_rights = u64::from(STATE_OPEN) | u64::from(RIGHT_READ) << 32;
        assert_eq!(outcome.values, [0, 0x5ec2e7, state_and_rights, 0]);
        assert_eq!([target.read(THERE), target.read(THERE + 0x1000)], [0x5ec2e7, 0]);
        let (view, counters, is_end) = *tokens.state().told.last().unwrap();
        assert_eq!((view, counters.refused_writes, is_end), (1, 2, true));
    }
}

#[test]
fn a_writable_view_is_written() {
    if !has_windows() {
        return;
    }
    for way in ways() {
        let target = Target::new();
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadWrite));
        let program = guest(way).attach().write(FIRST + THERE, 0xbeef).detach(DESCRIPTOR).power_off();
        let outcome = run_with_tokens(&program, &tokens, |_| {}).unwrap();
        assert_eq!(outcome.values, [0, 0]);
        assert_eq!(target.read(THERE), 0xbeef);
    }
}

#[test]
fn data_and_holes_are_found_without_touching_either() {
    if !has_windows() {
        return;
    }
    for way in ways() {
        let target = Target::new();
        for page in [0x4000, 0x5000, 0x8_1000, 0xf_f000] {
            target.write(page, 1);
        }
        let before = target.allocated();
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadOnly));
        let program = guest(way)
            .attach()
            .seek(DESCRIPTOR, 0, SEEK_DATA)
            .seek(DESCRIPTOR, 0x4008, SEEK_DATA)
            .seek(DESCRIPTOR, 0x4008, SEEK_HOLE)
            .seek(DESCRIPTOR, 0x6000, SEEK_DATA)
            .seek(DESCRIPTOR, TARGET_HOLE, SEEK_HOLE)
            .seek(DESCRIPTOR, 0xf_f000, SEEK_HOLE)
            .seek(DESCRIPTOR, 0x10_0000, SEEK_DATA)
            .seek(DESCRIPTOR, u64::MAX, SEEK_HOLE)
            .seek(DESCRIPTOR, 0, 2)
            .seek(DESCRIPTOR + 0x1000, 0, SEEK_DATA)
            .seek(FIRST, 0, SEEK_DATA)
            .call(SEEK, [DESCRIPTOR, 1 << 40, SEEK_DATA])
            .power_off();
        let outcome = run_with_tokens(&program, &tokens, |_| {}).unwrap();
        let [none, invalid, fault] = [KvmError::NoEnt, KvmError::Inval, KvmError::Fault].map(refused);
        let expected = [
            [0, 0x4000],
            [0, 0x4008],
            [0, 0x6000],
            [0, 0x8_1000],
            [0, 0x8_2000],
            [none, 0xf_f000],
            [none, 0x10_0000],
            [none, u64::MAX],
            [invalid, 0],
            [invalid, 0],
            [invalid, 0],
        ];
        assert_eq!(outcome.values[1..], [expected.as_flattened(), &[fault]].concat());
        assert_eq!(target.allocated(), before);
        // Nobody has detached: the machine's end did.
        let (_, counters, is_end) = *tokens.state().told.last().unwrap();
        assert_eq!((counters.seeks, is_end), (8, true));
    }
}

#[test]
fn bad_requests_are_refused_and_spare_the_token() {
    if !has_windows() {
        return;
    }
    for way in ways() {
        const UNMAPPED: u64 = 1 << 40;
        const NO_RAM: u64 = 0xd000_0000;
        let target = Target::new();
        let call = |request, result| guest(way).call(ATTACH, [request, result, 0]);
        let with = |at, value| guest(way).write(REQUEST + at, value).attach();
        let cases: [(&str, Guest, KvmError); 11] = [
            ("request not mapped", call(UNMAPPED, RESULT), KvmError::Fault),
            ("request without RAM", call(NO_RAM, RESULT), KvmError::Fault),
            ("request at the top", call(u64::MAX - 8, RESULT), KvmError::Fault),
            ("request in a window", call(DESCRIPTOR, RESULT), KvmError::Fault),
            ("result not mapped", call(REQUEST, UNMAPPED), KvmError::Fault),
            ("result without RAM", call(REQUEST, NO_RAM), KvmError::Fault),
            ("result in a window", call(REQUEST, DESCRIPTOR), KvmError::Fault),
            ("unknown flag", with(56, 2), KvmError::Inval),
            ("reserved", with(56, 1 << 32), KvmError::Inval),
            ("detach of nothing", guest(way).detach(DESCRIPTOR), KvmError::NoEnt),
            ("detach of garbage", guest(way).detach(u64::MAX), KvmError::NoEnt),
        ];
        for (name, case, error) in cases {
            let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadOnly));
            let outcome = run_with_tokens(&case.power_off(), &tokens, |_| {}).unwrap();
            assert_eq!(outcome.values, [refused(error)], "{name}");
            assert_eq!(outcome.asked, 0, "{name}");
        }
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadOnly));
        let unknown = guest(way).write(REQUEST, 0).attach().power_off();
        let outcome = run_with_tokens(&unknown, &tokens, |_| {}).unwrap();
        assert_eq!((outcome.values, outcome.asked), (vec![refused(KvmError::NoEnt)], 1));
        let hidden =
            run_with_tokens(&guest(way).attach().power_off(), &tokens, |config| config.window = false);
        assert_eq!(hidden.unwrap().values, [refused(KvmError::OpNotSupp)]);
    }
}

#[test]
fn as_many_views_as_there_are_seats_and_all_of_them_again() {
    if !has_windows() {
        return;
    }
    for way in ways() {
        let target = Target::new();
        target.write(THERE, 7);
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadOnly));
        let ring =
            |guest: Guest, count| guest.repeat(count, |guest| guest.ring(ATTACH, [REQUEST, RESULT, 0]));
        let program = ring(guest(way), 100).attach();
        let program =
            (0..64).fold(program, |guest, page| guest.ring(DETACH, [DESCRIPTOR + page * 0x1000, 0, 0]));
        // Each comes and goes: nothing is used up.
        let program = program
            .repeat(200, |guest| guest.ring(ATTACH, [REQUEST, RESULT, 0]).ring(DETACH, [DESCRIPTOR, 0, 0]))
            .attach()
            .report_memory(RESULT + 8)
            .report_memory(FIRST + THERE)
            .power_off();
        let outcome = run_with_tokens(&program, &tokens, |_| {}).unwrap();
        assert_eq!(outcome.values, [refused(KvmError::NoMem), 0, FIRST, 7]);
        assert_eq!(outcome.asked, 64 + 200 + 1);
        assert!(tokens.state().open.is_empty());
    }
}

#[test]
fn a_view_whose_right_ends_at_once_is_never_shown() {
    if !has_windows() {
        return;
    }
    for way in ways() {
        let target = Target::new();
        target.write(THERE, 7);
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadOnly));
        tokens.state().ends_at_once = true;
        let program = guest(way).attach().report_memory(FIRST + THERE).power_off();
        let outcome = run_with_tokens(&program, &tokens, |_| {}).unwrap();
        assert_eq!(outcome.values, [refused(KvmError::NoEnt), u64::MAX]);
    }
}

/// Calls `event` on the machine's views once the guest has searched one.
fn when_searched(tokens: &OneToken, event: impl FnOnce(&Views)) {
    while tokens.state().told.is_empty() {
        std::thread::sleep(Duration::from_millis(1));
    }
    // Long enough for the guest to be in the midst of its loop; if not, the loop ends at once.
    std::thread::sleep(Duration::from_millis(20));
    event(&tokens.views());
}

type Event = fn(&Views);

#[test]
fn what_is_taken_back_turns_into_poison_while_the_guest_uses_it() {
    if !has_windows() {
        return;
    }
    const PAGE: u64 = 0x60_0000;
    let cases: [(&str, Event, u32); 3] = [
        ("revoked", |views| views.revoke(1), STATE_REVOKED),
        ("gone", |views| views.gone(1), STATE_GONE),
        ("lost", |views| views.lost(), STATE_GONE),
    ];
    for (way, rights) in
        ways().into_iter().flat_map(|way| [(way, Rights::ReadOnly), (way, Rights::ReadWrite)])
    {
        for (name, event, state) in cases {
            let target = Target::new();
            target.write(THERE, 0x5ec2e7);
            let tokens = OneToken::new(target.clone(), Scope::whole(rights));
            let bits = if rights == Rights::ReadOnly { RIGHT_READ } else { RIGHT_READ | RIGHT_WRITE };
            let words = |state: u32| u64::from(state) | u64::from(bits) << 32;
            let program = guest(way)
                .attach()
                .report_memory(FIRST + THERE)
                .ring(SEEK, [DESCRIPTOR, POSITION, SEEK_DATA])
                .touch_while(DESCRIPTOR + 24, words(STATE_OPEN), FIRST + THERE, rights == Rights::ReadWrite)
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
        }
    }
}

/// Where two CPUs tell each other how far they are.
const SIGN: u64 = 0x50_0800;
const STARTED: u64 = SIGN + 8;

#[test]
fn two_cpus_open_and_close_views_at_once_and_one_of_them_loses_one() {
    if !has_windows() {
        return;
    }
    const OTHER_REQUEST: u64 = 0x51_0200;
    const OTHER_RESULT: u64 = 0x51_0300;
    for way in ways() {
        let target = Target::new();
        target.write(THERE, 0x5ec2e7);
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadOnly));
        let open = u64::from(STATE_OPEN) | u64::from(RIGHT_READ) << 32;
        let program = guest(way)
            .write_token(OTHER_REQUEST, TOKEN)
            .attach()
            .second_cpu(|other| {
                // The first view is this CPU's: it reads until that is taken back, and opens and closes others then.
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
            scope.spawn(|| when_searched(&tokens, |views| views.revoke(1)));
            run_with_tokens(&program, &tokens, |config| config.vcpus = 2).unwrap()
        });
        assert_eq!(outcome.values, [0, 0, 0, 0, DESCRIPTOR, FIRST]);
        assert_eq!(outcome.exit, VmExit::PowerOff);
        assert!(tokens.state().open.is_empty());
    }
}

#[test]
fn a_reset_closes_all_views() {
    const STAGE: u64 = 0x61_0000;
    if !has_windows() {
        return;
    }
    for way in ways() {
        let target = Target::new();
        target.write(THERE, 0x5ec2e7);
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadWrite));
        // The target's memory is where the guest keeps, over the reset, how far it got.
        let program = guest(way)
            .write(STAGE, 0)
            .report_memory(DESCRIPTOR)
            .attach()
            .attach()
            .report_memory(FIRST + THERE)
            .skip_if_zero(FIRST + 0x1000, Guest::power_off)
            .write(FIRST + 0x1000, 1)
            .reset();
        let outcome =
            run_with_tokens(&program, &tokens, |config| config.reset = ResetPolicy::Restart).unwrap();
        assert_eq!(outcome.values, [0, 0, 0, 0x5ec2e7].repeat(2));
        let state = tokens.state();
        assert!(state.open.is_empty());
        assert_eq!(state.told.iter().filter(|(_, _, is_end)| *is_end).count(), 4);
    }
}

#[test]
fn a_view_follows_its_target() {
    if !has_windows() {
        return;
    }
    const MIB: u64 = 1 << 20;
    for way in ways() {
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
        let program = report_ranges(guest(way).attach())
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
                    views.changed(&changed);
                });
            });
            run_with_tokens(&program, &tokens, |_| {}).unwrap()
        });
        let before = [0, 2, 2, 0, MIB, 0, 2 * MIB, MIB, MIB, high];
        // The range that is gone is poison, the new one is behind it where large pages stay large, the other as it was.
        let after = [4, 2, 0, MIB, 0, 4 * MIB, 2 * MIB, 2 * MIB, low, 0, new, 0];
        assert_eq!(outcome.values, [before.as_slice(), &after].concat());
    }
}

#[test]
fn what_the_broker_takes_back_ends_at_once_pages_included() {
    if !has_windows() {
        return;
    }
    const OWN: u64 = 0x60_0000;
    const PAGE_TOKEN: u64 = 0x50_0a00;
    for way in ways() {
        let target = Target::new();
        target.write(THERE, 0x5ec2e7);
        let open = u64::from(STATE_OPEN) | u64::from(RIGHT_READ | RIGHT_WRITE) << 32;
        let make = |token| {
            guest(way)
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
                // The page is taken back just behind the views.
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
            while seeks(admin) == 0 {
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
