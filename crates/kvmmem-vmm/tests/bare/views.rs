// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Bare guests that open views.

use std::sync::Arc;

use kvmmem_abi::descriptor::MAGIC;
use kvmmem_abi::errno::KvmError;
use kvmmem_abi::hypercall::{ATTACH, DETACH, SEEK, SEEK_DATA, SEEK_HOLE};
use kvmmem_abi::native::{ATTACH_READ_ONLY, RIGHT_READ, STATE_OPEN};
use kvmmem_client::vmm::{Rights, Scope, ViewCounters};
use kvmmem_vmm::VmExit;

use crate::fixture::{TARGET_HOLE, TOKEN, Target, refused, run_with_tokens, window_methods};
use crate::guest::{Guest, Method, WINDOW};
use crate::tokens::OneToken;

/// Where the guest keeps its request and finds the result.
pub(crate) const REQUEST: u64 = 0x50_0200;
pub(crate) const RESULT: u64 = 0x50_0300;
pub(crate) const POSITION: u64 = 0x50_0400;
/// The first view's descriptor page and its part of the window.
pub(crate) const DESCRIPTOR: u64 = WINDOW;
pub(crate) const FIRST: u64 = WINDOW + (2 << 20);
/// A page of the target's.
pub(crate) const THERE: u64 = 0x4_2000;

/// A guest that sees windows and knows its token.
pub(crate) fn guest(method: Method) -> Guest {
    Guest::calling(method)
        .see_windows(0x7_0000)
        .write_token(REQUEST, TOKEN)
        .write(REQUEST + 32, 1000 << 32 | 42)
        .write(REQUEST + 40, u64::from_le_bytes(*b"tool\0\0\0\0"))
}

/// A target that has a secret at [`THERE`], and its token.
pub(crate) fn secret(rights: Rights) -> (Arc<Target>, Arc<OneToken>) {
    let target = Target::new();
    target.write(THERE, 0x5ec2e7);
    (target.clone(), OneToken::new(target, Scope::whole(rights)))
}

pub(crate) trait Calls {
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
    for method in window_methods() {
        let (target, tokens) = secret(Rights::ReadOnly);
        target.write(0x8_1000, 0xb0b);
        let program = guest(method)
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
    for method in window_methods() {
        // The grant would allow more than the guest asks for.
        let (target, tokens) = secret(Rights::ReadWrite);
        let program = guest(method)
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
    for method in window_methods() {
        let target = Target::new();
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadWrite));
        let program =
            guest(method).attach().write(FIRST + THERE, 0xbeef).detach(DESCRIPTOR).power_off();
        let outcome = run_with_tokens(&program, &tokens, |_| {}).unwrap();
        assert_eq!(outcome.values, [0, 0]);
        assert_eq!(target.read(THERE), 0xbeef);
    }
}

#[test]
fn data_and_holes_are_found_without_touching_either() {
    for method in window_methods() {
        let target = Target::new();
        for page in [0x4000, 0x5000, 0x8_1000, 0xf_f000] {
            target.write(page, 1);
        }
        let before = target.allocated();
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadOnly));
        let program = guest(method)
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
        let [none, invalid, fault] =
            [KvmError::NoEnt, KvmError::Inval, KvmError::Fault].map(refused);
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
        // The guest has not detached: the machine's end did.
        let (_, counters, is_end) = *tokens.state().told.last().unwrap();
        assert_eq!((counters.seeks, is_end), (8, true));
    }
}

#[test]
fn bad_requests_are_refused_and_spare_the_token() {
    for method in window_methods() {
        const UNMAPPED: u64 = 1 << 40;
        const NO_RAM: u64 = 0xd000_0000;
        let target = Target::new();
        let call = |request, result| guest(method).call(ATTACH, [request, result, 0]);
        let with = |at, value| guest(method).write(REQUEST + at, value).attach();
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
            ("detach of nothing", guest(method).detach(DESCRIPTOR), KvmError::NoEnt),
            ("detach of garbage", guest(method).detach(u64::MAX), KvmError::NoEnt),
        ];
        for (name, case, error) in cases {
            let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadOnly));
            let outcome = run_with_tokens(&case.power_off(), &tokens, |_| {}).unwrap();
            assert_eq!(outcome.values, [refused(error)], "{name}");
            assert_eq!(outcome.asked, 0, "{name}");
        }
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadOnly));
        let unknown = guest(method).write(REQUEST, 0).attach().power_off();
        let outcome = run_with_tokens(&unknown, &tokens, |_| {}).unwrap();
        assert_eq!((outcome.values, outcome.asked), (vec![refused(KvmError::NoEnt)], 1));
        let hidden = run_with_tokens(&guest(method).attach().power_off(), &tokens, |config| {
            config.window = false
        });
        assert_eq!(hidden.unwrap().values, [refused(KvmError::OpNotSupp)]);
    }
}

#[test]
fn all_descriptors_hold_views_and_can_be_used_again() {
    for method in window_methods() {
        let target = Target::new();
        target.write(THERE, 7);
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadOnly));
        let ring = |guest: Guest, count| {
            guest.repeat(count, |guest| guest.ring(ATTACH, [REQUEST, RESULT, 0]))
        };
        let program = ring(guest(method), 100).attach();
        let program = (0..64)
            .fold(program, |guest, page| guest.ring(DETACH, [DESCRIPTOR + page * 0x1000, 0, 0]));
        // Each comes and goes: nothing is used up.
        let program = program
            .repeat(200, |guest| {
                guest.ring(ATTACH, [REQUEST, RESULT, 0]).ring(DETACH, [DESCRIPTOR, 0, 0])
            })
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
    for method in window_methods() {
        let target = Target::new();
        target.write(THERE, 7);
        let tokens = OneToken::new(target.clone(), Scope::whole(Rights::ReadOnly));
        tokens.state().ends_at_once = true;
        let program = guest(method).attach().report_memory(FIRST + THERE).power_off();
        let outcome = run_with_tokens(&program, &tokens, |_| {}).unwrap();
        assert_eq!(outcome.values, [refused(KvmError::NoEnt), u64::MAX]);
    }
}
