// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMUs that go wrong while views are opened and closed.

mod common;

use std::sync::Arc;

use common::fake_qmp::{FakeQemu, Fault};
use common::{TestBroker, caller, request, wait_for};
use kvmmem_broker::admin::{AddIntrospector, AdminError, GrantRequest, OnSilence, Rights, Span};
use kvmmem_broker::introspector::{Introspector, OpenError, Opened};
use kvmmem_broker::link::{Region, Registration, VmmLink};
use rustix::fs::SealFlags;

/// The introspector's context id.
const CID: u32 = 78;

/// The commands by which a view of one window is opened: where the slots are; the file, its backend and device; the
/// descriptor, its backend and device; and the two files taken back.
const OPENING: usize = 9;

/// Those of them whose failure does no harm.
const HARMLESS: usize = 2;

struct Pair {
    broker: TestBroker,
    qemu: FakeQemu,
    introspector: Arc<Introspector>,
    _target: VmmLink,
}

fn add(broker: &TestBroker, qemu: &FakeQemu) -> Result<Arc<Introspector>, String> {
    let on_silence = OnSilence::Report;
    let request = AddIntrospector { which: qemu.which(), cid: Some(CID), name: None, on_silence };
    match broker.admin().add_introspector(&request) {
        Ok(_) => Ok(broker.state.introspectors().by_cid(CID).unwrap()),
        Err(AdminError::Refused { message, .. }) => Err(message),
        Err(error) => panic!("{error}"),
    }
}

impl Pair {
    fn start() -> Self {
        let broker = TestBroker::start();
        broker.state.introspectors().set_door(None);
        let qemu = FakeQemu::start();
        let introspector = add(&broker, &qemu).unwrap();
        // Two regions, of which one is shown: one window.
        let target = broker.target("tiger");
        Self { broker, qemu, introspector, _target: target }
    }

    fn open(&self) -> Result<Opened, OpenError> {
        let spans = Some(vec![Span { gpa: 0, len: 0x4000 }]);
        let request = GrantRequest { spans, ..request(Rights::ReadOnly) };
        self.introspector.open(&self.broker.grant(&request).token, &caller(), false)
    }

    /// Lets the command after so many go wrong.
    fn arm(&self, after: usize, fault: Fault) {
        self.qemu.machine().fault = Some((after, fault));
    }

    /// What went wrong is undone, and a view can be opened.
    #[track_caller]
    fn recovers(&self) {
        wait_for("all to be undone", || self.qemu.is_empty());
        wait_for("a view to open", || self.open().is_ok());
        wait_for("the view to be gone", || self.qemu.is_empty());
        wait_for("its end to be known", || self.broker.grants().iter().all(|grant| grant.views.is_empty()));
    }
}

#[test]
fn a_refusal_at_any_step_undoes_what_was_done() {
    let pair = Pair::start();
    pair.recovers();
    for step in 0..OPENING {
        pair.arm(step, Fault::Refuse);
        let opened = pair.open();
        assert_eq!(opened.is_err(), step < OPENING - HARMLESS, "step {step}: {opened:?}");
        drop(opened);
        assert!(pair.qemu.is_empty(), "step {step}");
        pair.recovers();
    }
}

#[test]
fn a_connection_that_fails_at_any_step_is_made_again_and_nothing_is_left() {
    let pair = Pair::start();
    for fault in [Fault::Close, Fault::CloseAfter, Fault::Garbage, Fault::Nonsense, Fault::Flood] {
        for step in 0..OPENING {
            pair.arm(step, fault);
            drop(pair.open());
            pair.recovers();
        }
    }
}

#[test]
fn a_qemu_that_hangs_is_left_after_a_while() {
    let pair = Pair::start();
    for step in [0, 3, 6] {
        pair.arm(step, Fault::Silence);
        let error = pair.open().unwrap_err();
        assert!(matches!(error, OpenError::Ask(_) | OpenError::Plug(_) | OpenError::Ended), "{error:?}");
        pair.recovers();
    }
}

#[test]
fn an_open_view_ends_with_the_connection() {
    let pair = Pair::start();
    for fault in [Fault::Close, Fault::Flood, Fault::Garbage] {
        let opened = pair.open().unwrap();
        pair.arm(0, fault);
        // Any command will do: there is one more view to be opened.
        drop(pair.open());
        wait_for("the view to end", || opened.ended());
        drop(opened);
        pair.recovers();
    }
}

#[test]
fn what_goes_wrong_while_a_view_is_closed_is_tried_again() {
    let pair = Pair::start();
    for fault in [Fault::Refuse, Fault::Close, Fault::CloseAfter, Fault::Nonsense] {
        // The device, and the two backends.
        for step in 0..3 {
            let opened = pair.open().unwrap();
            pair.arm(step, fault);
            drop(opened);
            pair.recovers();
        }
    }
}

#[test]
fn a_guest_that_lets_go_of_nothing_keeps_its_slots_and_no_more() {
    let pair = Pair::start();
    pair.qemu.machine().is_stubborn = true;
    drop(pair.open().unwrap());
    drop(pair.open().unwrap());
    assert_eq!(pair.qemu.machine().devices.len(), 4);
    let views: usize = pair.broker.grants().iter().map(|grant| grant.views.len()).sum();
    assert_eq!(views, 2);
    pair.qemu.machine().is_stubborn = false;
    pair.recovers();
}

#[test]
fn a_view_of_many_windows_takes_several_slots_or_none() {
    let pair = Pair::start();
    let ram = common::memfd(1 << 20, SealFlags::SHRINK);
    let regions = vec![Region { gpa: 0, len: 1 << 20, offset: 0, file: 0 }];
    let registration = Registration { regions, ..common::target("lion") };
    let _lion = VmmLink::connect(&pair.broker.path, registration, [ram]).unwrap();
    let spans = (0..16).map(|page| Span { gpa: page << 13, len: 0x1000 }).collect();
    let request =
        GrantRequest { target: "lion".into(), spans: Some(spans), uses: 100, ..request(Rights::ReadWrite) };
    let token = pair.broker.grant(&request).token;
    let open = || pair.introspector.open(&token, &caller(), true);
    let opened = open().unwrap();
    let addresses: Vec<String> = pair.qemu.machine().devices.values().cloned().collect();
    assert_eq!(addresses.len(), 16 + 3);
    let functions = |slot: &str| addresses.iter().filter(|address| address.starts_with(slot)).count();
    assert_eq!(["0x1.", "0x2.", "0x3."].map(functions), [8, 8, 3]);
    drop(opened);
    assert!(pair.qemu.is_empty());
    // Where the slots are; the file; each window and each descriptor, with its file.
    for step in (0..1 + 1 + 2 * 16 + 3 * 3).step_by(4) {
        pair.arm(step, Fault::Refuse);
        assert!(open().is_err(), "step {step}");
        assert!(pair.qemu.is_empty(), "step {step}");
    }
    drop(open().unwrap());
}

#[test]
fn a_qemu_that_goes_wrong_while_it_is_added_is_not_added() {
    let broker = TestBroker::start();
    broker.state.introspectors().set_door(None);
    let qemu = FakeQemu::start();
    for fault in [Fault::Refuse, Fault::Close, Fault::Garbage, Fault::Nonsense, Fault::Flood] {
        for step in 0..9 {
            qemu.machine().fault = Some((step, fault));
            let message = add(&broker, &qemu).map(|_| ()).expect_err(&format!("{fault:?} {step}"));
            assert!(message.contains("QEMU") || message.contains("QMP"), "{fault:?} {step}: {message}");
            assert!(broker.admin().targets().unwrap().is_empty());
        }
    }
    qemu.machine().fault = None;
    add(&broker, &qemu).unwrap();
}
