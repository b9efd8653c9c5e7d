// SPDX-License-Identifier: Apache-2.0 OR MIT
//! QEMUs that go wrong while views are opened and closed.

mod common;

use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem_client::ClientError;
use kvmmem_client::admin::{Admin, GrantRequest, IntrospectorRequest, OnSilence, Rights, Span};
use kvmmem_client::vmm::{Region, Registration, VmmLink};

use common::fake_qmp::{FakeQemu, Fault};
use common::{TestBroker, caller, request, returns, short_confirmation, wait_for};
use kvmmem_broker::{Introspector, OpenError, OpenView};
use kvmmem_proto::guest::MappedBy;
use rustix::fs::SealFlags;

/// The introspector's context id.
const CID: u32 = 78;

/// The commands by which a view of one window is opened: where the slots are; the file, its backend
/// and device; the descriptor, its backend and device; and the two files removed.
const OPENING: usize = 9;

/// Those of them whose failure does no harm.
const HARMLESS: usize = 2;

struct Pair {
    broker: TestBroker,
    qemu: FakeQemu,
    introspector: Arc<Introspector>,
    target: Option<VmmLink>,
}

/// A view of one window.
fn open(broker: &TestBroker, introspector: &Arc<Introspector>) -> Result<OpenView, OpenError> {
    let spans = Some(vec![Span { gpa: 0, len: 0x4000 }]);
    let request = GrantRequest { spans, ..request(Rights::ReadOnly) };
    introspector.open(&broker.grant(&request).token, &caller(), false, MappedBy::Module)
}

fn add(broker: &TestBroker, qemu: &FakeQemu) -> Result<Arc<Introspector>, String> {
    add_as(broker, qemu, "fake", CID, OnSilence::Report)
}

fn add_as(
    broker: &TestBroker,
    qemu: &FakeQemu,
    name: &str,
    cid: u32,
    on_silence: OnSilence,
) -> Result<Arc<Introspector>, String> {
    let request = IntrospectorRequest {
        which: qemu.which(),
        cid: Some(cid),
        name: Some(name.into()),
        on_silence,
        trusted: false,
    };
    match broker.admin().add_introspector(&request) {
        Ok(_) => Ok(broker.service.introspector(cid).unwrap()),
        Err(ClientError::Refused { message, .. }) => Err(message),
        Err(error) => panic!("{error}"),
    }
}

impl Pair {
    fn start() -> Self {
        Self::start_with(OnSilence::Report)
    }

    fn start_with(on_silence: OnSilence) -> Self {
        // A QEMU that goes wrong may confirm nothing.
        let broker = TestBroker::start_with(short_confirmation());
        broker.service.set_guest_port(None);
        let qemu = FakeQemu::start();
        let introspector = add_as(&broker, &qemu, "fake", CID, on_silence).unwrap();
        // Two regions, of which one is shown: one window.
        let target = Some(broker.target("tiger"));
        Self { broker, qemu, introspector, target }
    }

    fn open(&self) -> Result<OpenView, OpenError> {
        open(&self.broker, &self.introspector)
    }

    /// Makes QEMU send events without end, from now on.
    fn flood(&self) {
        self.arm(0, Fault::FloodForEver);
        let mut admin = Admin::connect(&self.broker.path).unwrap();
        // Any command will do, answered or not.
        let _ = returns("a command before events without end", move || {
            admin.free_slots("fake").is_ok()
        });
        wait_for("events to be taken", || self.qemu.machine().floods > 0);
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
        wait_for("its end to be known", || {
            self.broker.grants().iter().all(|grant| grant.views.is_empty())
        });
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
        assert!(
            matches!(error, OpenError::Ask(_) | OpenError::Plug(_) | OpenError::Ended),
            "{error:?}"
        );
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
    let request = GrantRequest {
        target: "lion".into(),
        spans: Some(spans),
        uses: 100,
        ..request(Rights::ReadWrite)
    };
    let token = pair.broker.grant(&request).token;
    let open = || pair.introspector.open(&token, &caller(), true, MappedBy::Module);
    let opened = open().unwrap();
    let addresses: Vec<String> = pair.qemu.machine().devices.values().cloned().collect();
    assert_eq!(addresses.len(), 16 + 3);
    let functions =
        |slot: &str| addresses.iter().filter(|address| address.starts_with(slot)).count();
    assert_eq!(["0x1.", "0x2.", "0x3."].map(functions), [8, 8, 3]);
    let is_undone = || wait_for("all to be undone", || pair.qemu.is_empty());
    drop(opened);
    is_undone();
    // Where the slots are; the file; each window and each descriptor, with its file.
    for step in (0..1 + 1 + 2 * 16 + 3 * 3).step_by(4) {
        pair.arm(step, Fault::Refuse);
        assert!(open().is_err(), "step {step}");
        is_undone();
    }
    drop(open().unwrap());
}

#[test]
fn a_qemu_that_goes_wrong_while_it_is_added_is_not_added() {
    let broker = TestBroker::start();
    broker.service.set_guest_port(None);
    let qemu = FakeQemu::start();
    for fault in [Fault::Refuse, Fault::Close, Fault::Garbage, Fault::Nonsense, Fault::Flood] {
        for step in 0..9 {
            qemu.machine().fault = Some((step, fault));
            let message = add(&broker, &qemu).map(|_| ()).expect_err(&format!("{fault:?} {step}"));
            assert!(
                message.contains("QEMU") || message.contains("QMP"),
                "{fault:?} {step}: {message}"
            );
            assert!(broker.admin().targets().unwrap().is_empty());
        }
    }
    qemu.machine().fault = None;
    add(&broker, &qemu).unwrap();
}

#[test]
fn a_process_that_executes_another_program_while_its_qemu_is_asked_is_not_added() {
    let broker = TestBroker::start();
    broker.service.set_guest_port(None);
    let qemu = FakeQemu::start();
    // The first command is how a connection begins; the next ones ask which VM it is.
    qemu.machine().fault = Some((1, Fault::Exec));
    let message = add(&broker, &qemu).map(|_| ()).unwrap_err();
    assert!(message.contains("not QEMU"), "{message}");
    assert!(broker.admin().targets().unwrap().is_empty());
}

#[test]
fn a_reset_ends_the_views_before_it_and_no_later_one() {
    let pair = Pair::start();
    // The guest releases nothing, so that the first view's end keeps the thread that ends views
    // busy.
    pair.qemu.machine().is_stubborn = true;
    let earlier = pair.open().unwrap();
    pair.arm(0, Fault::Reset);
    pair.broker.admin().free_slots("fake").unwrap();
    wait_for("the view before the reset to end", || earlier.ended());
    // The VM is reset once more, and a view opened, before that thread looks for what ends by this
    // reset.
    pair.arm(0, Fault::Reset);
    let later = pair.open().unwrap();
    // That thread tries again to unplug the first view, and has looked for that then.
    pair.qemu.machine().is_stubborn = false;
    wait_for("the earlier view's devices to go", || pair.qemu.machine().devices.len() == 2);
    assert!(!later.ended());
    pair.arm(0, Fault::Reset);
    pair.broker.admin().free_slots("fake").unwrap();
    wait_for("the view before the last reset to end", || later.ended());
    drop((earlier, later));
    pair.recovers();
}

#[test]
fn a_qemu_that_floods_is_killed_where_the_operator_wants_it() {
    let mut pair = Pair::start_with(OnSilence::Kill);
    pair.qemu.machine().is_stubborn = true;
    let opened = pair.open().unwrap();
    let grant = pair.broker.grants()[0].id;
    pair.flood();
    let path = pair.broker.path.clone();
    // The grant may be forgotten by then: a QEMU that floods is lost, and that alone gets it
    // killed.
    let _ = returns("the revocation", move || Admin::connect(&path).unwrap().revoke(grant).is_ok());
    wait_for("the QEMU to be killed", || pair.qemu.has_ended());
    wait_for("the view to end", || opened.ended());
    returns("the view's close", move || drop(opened));
}

#[test]
fn a_qemu_that_answers_slowly_is_killed_in_time() {
    let mut pair = Pair::start_with(OnSilence::Kill);
    pair.qemu.machine().is_stubborn = true;
    let opened: Vec<OpenView> = (0..8).map(|_| pair.open().unwrap()).collect();
    // Within what a command may take, and for all of them far beyond what a revocation may.
    pair.qemu.machine().delay = Duration::from_millis(1500);
    let asked = pair.qemu.machine().asked;
    drop(pair.target.take());
    wait_for("the QEMU to be killed", || pair.qemu.has_ended());
    // It was not waited for until it had answered for each of the views.
    assert!(pair.qemu.machine().asked - asked < opened.len());
    returns("the views' close", move || drop(opened));
}

/// A QEMU that floods and whose guest keeps its view, and another one with its view. That one is
/// added later, and so ended later where one is ended after the other.
fn flooding_beside_another() -> (Pair, OpenView, FakeQemu, Arc<Introspector>, OpenView) {
    let pair = Pair::start();
    pair.qemu.machine().is_stubborn = true;
    let opened = pair.open().unwrap();
    let other = FakeQemu::start();
    let second = add_as(&pair.broker, &other, "second", CID + 1, OnSilence::Report).unwrap();
    let seen = open(&pair.broker, &second).unwrap();
    pair.flood();
    (pair, opened, other, second, seen)
}

#[test]
fn a_qemu_that_floods_holds_up_no_other() {
    let (pair, opened, other, _second, seen) = flooding_beside_another();
    let grants: Vec<u64> = pair.broker.grants().iter().map(|grant| grant.id).collect();
    for grant in grants {
        let path = pair.broker.path.clone();
        returns("a revocation", move || Admin::connect(&path).unwrap().revoke(grant).is_ok());
    }
    wait_for("the other view to end", || seen.ended() && other.is_empty());
    let mut admin = pair.broker.admin();
    returns("the removal", move || admin.remove_introspector("fake")).unwrap();
    assert!(pair.broker.service.introspector(CID).is_none());
    returns("the view's close", move || drop(opened));
}

#[test]
fn the_broker_ends_though_qemus_flood() {
    let (pair, opened, other, second, seen) = flooding_beside_another();
    let Pair { broker, qemu: _qemu, introspector, target } = pair;
    returns("the broker's end", move || drop((broker.stop(), introspector, target)));
    assert!(seen.ended());
    // It still carries out what it was sent.
    wait_for("the other view's devices to go", || other.is_empty());
    returns("the views' close", move || drop((opened, seen, second)));
}

#[test]
fn another_qemu_at_the_same_socket_is_not_taken_for_it() {
    let pair = Pair::start();
    pair.qemu.machine().name = "other".into();
    pair.arm(0, Fault::Close);
    assert!(pair.open().is_err());
    let asked = pair.qemu.machine().asked;
    wait_for("it to be asked who it is", || pair.qemu.machine().asked > asked + 3);
    assert!(pair.open().is_err());
    pair.qemu.machine().name = String::new();
    pair.recovers();
}

#[test]
fn an_introspector_that_is_removed_can_be_added_again() {
    let pair = Pair::start();
    let opened = pair.open().unwrap();
    pair.broker.admin().remove_introspector("fake").unwrap();
    assert!(opened.ended());
    // It still carries out what it was sent.
    wait_for("its devices to go", || pair.qemu.is_empty());
    assert!(pair.broker.service.introspector(CID).is_none());
    let targets = pair.broker.admin().targets().unwrap();
    assert_eq!(targets.into_iter().map(|vm| vm.identity.name).collect::<Vec<_>>(), ["tiger"]);
    assert!(pair.broker.grants().iter().all(|grant| grant.views.is_empty()));
    // Its connection is closed by then, or soon, and a QEMU serves one.
    wait_for("it to be added again", || add(&pair.broker, &pair.qemu).is_ok());
    let added_again = pair.broker.service.introspector(CID).unwrap();
    assert!(!Arc::ptr_eq(&added_again, &pair.introspector));
    assert!(matches!(pair.open(), Err(OpenError::Token { .. } | OpenError::Ask(_))));
    drop(open(&pair.broker, &added_again).unwrap());
    pair.broker.admin().remove_introspector("fake").unwrap();
    assert!(pair.broker.service.introspector(CID).is_none());
}

#[test]
fn a_qemu_that_releases_memory_slowly_is_waited_for_where_it_is_removed() {
    let pair = Pair::start();
    let _opened = pair.open().unwrap();
    // Longer than one attempt to end a view waits for the memory.
    pair.qemu.machine().delay = Duration::from_millis(250);
    let began = Instant::now();
    pair.broker.admin().remove_introspector("fake").unwrap();
    // On a slow machine the broker may have waited for as long as it does.
    assert!(pair.qemu.is_empty() || began.elapsed() > Duration::from_secs(4));
}
