// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Views of an introspector under this machine's stock QEMU; the test plays the guest.

mod common;

use std::collections::BTreeSet;

use common::pair::{CID, Pair, add, eject, number, pages, slots, state, write};
use common::qemu::{Qemu, wait_long};
use common::{TestBroker, caller, request, short_confirmation, wait_for};
use kvmmem_abi::descriptor::{COMPLAINT_AT, COMPLAINT_NO_ADDRESS, SEEN_ALL, SEEN_AT};
use kvmmem_abi::native::{STATE_GONE, STATE_OPEN, STATE_REVOKED};
use kvmmem_broker::{OpenError, OpenView};
use kvmmem_client::ClientError;
use kvmmem_client::admin::{FreeSlots, GrantRequest, IntrospectorRequest, OnSilence, Rights};
use kvmmem_proto::guest::MappedBy;

#[test]
fn a_tool_without_the_module_acknowledges_or_its_bus_is_retired() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    let log = pair.broker.directory.path().join("audit");
    pair.broker.state.write_audit_to(&log).unwrap();
    let guest = pair.plain_guest();
    let opened = pair.open_for_library().unwrap();
    let page = || pages(pair.qemu.process.id()).pop().unwrap();
    assert_eq!((number(&page(), SEEN_AT), pair.marks()), (0, 1));
    write(&page(), SEEN_AT, &SEEN_ALL.to_le_bytes());
    drop(opened);
    wait_for("the view to go", || pair.counts() == (0, 0) && pair.marks() == 0);
    assert_eq!(pair.retired(), [""; 0]);

    // The kernel of a tool that is killed closes its connection.
    let opened = pair.open_for_library().unwrap();
    opened.tool_has_closed();
    drop(opened);
    wait_for("the view to go", || pair.counts() == (0, 0) && pair.marks() == 0);
    assert_eq!(pair.retired(), [""; 0]);

    // A tool that hangs does nothing. All slots of this bus share its addresses.
    let opened = pair.open_for_library().unwrap();
    drop(opened);
    wait_for("the port to be retired", || pair.retired() == ["pci.0"]);
    wait_for("the view to go", || (pair.counts(), pair.marks()) == ((0, 0), 1));
    assert_eq!(pair.broker.admin().free_slots("watcher").unwrap().free, 0);
    for error in
        [pair.open_for_library().unwrap_err(), pair.open(&request(Rights::ReadOnly)).unwrap_err()]
    {
        let text = error.to_string();
        assert!(
            matches!(error, OpenError::NoPlace { free: 0, .. }) && text.contains("pci.0"),
            "{text}"
        );
    }
    let audit = std::fs::read_to_string(&log).unwrap();
    let line = audit.lines().find(|line| line.contains("\"port_retired\"")).unwrap();
    assert!(line.contains("\"pci.0\""), "{line}");

    // Another registration finds the mark.
    pair.broker.admin().remove_introspector("watcher").unwrap();
    add(&pair.broker, &pair.qemu, OnSilence::Report).unwrap();
    assert_eq!(pair.retired(), ["pci.0"]);
    pair.reset();
    wait_for("the port to be used again", || pair.retired().is_empty());
    assert_eq!(pair.marks(), 0);
    let introspector = pair.broker.service.introspector(CID).unwrap();
    let token = pair.broker.grant(&request(Rights::ReadOnly)).token;
    let opened = introspector.open(&token, &caller(), false, MappedBy::Library).unwrap();
    // A reset under a view takes all mappings along.
    pair.reset();
    wait_for("the view to end", || opened.ended());
    drop(opened);
    wait_for("the view to go", || pair.counts() == (0, 0) && pair.marks() == 0);
    assert_eq!(pair.retired(), [""; 0]);
    drop(guest);
}

#[test]
fn a_view_comes_and_goes_with_its_devices() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    let driver = pair.driver();
    let room = || pair.broker.admin().free_slots("watcher").unwrap();
    let FreeSlots { free, count, .. } = room();
    assert!(free > 20 && free <= count);
    for _ in 0..3 {
        let opened = pair.open(&request(Rights::ReadOnly)).unwrap();
        assert!(!opened.ended());
        assert_eq!((room().free, room().count), (free - 1, count));
        assert_eq!(pair.counts(), (2, 2));
        let [page] = &pages(pair.qemu.process.id())[..] else { panic!() };
        assert_eq!((number(page, 0), state(page)), (kvmmem_abi::descriptor::MAGIC, STATE_OPEN));
        let views: usize = pair.broker.grants().iter().map(|grant| grant.views.len()).sum();
        assert_eq!(views, 1);
        drop(opened);
        wait_for("the devices to go", || pair.counts() == (0, 0));
        wait_for("QEMU to close what it was given", || pages(pair.qemu.process.id()).is_empty());
        wait_for("the view to end", || {
            pair.broker.grants().iter().all(|grant| grant.views.is_empty())
        });
        assert_eq!((room().free, room().count), (free, count));
    }
    let of_target = pair.broker.admin().free_slots("tiger").unwrap_err();
    assert!(of_target.to_string().contains("not added as an introspector"), "{of_target}");
    drop(driver);
}

/// The driver puts slots together, and gives them to files, by what their pages carry.
#[test]
fn views_by_one_token_are_told_apart() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    let _driver = pair.driver();
    let granted = pair.broker.grant(&GrantRequest { uses: 2, ..request(Rights::ReadOnly) });
    let open =
        || pair.introspector.open(&granted.token, &caller(), false, MappedBy::Module).unwrap();
    let opened = [open(), open()];
    let pages = pages(pair.qemu.process.id());
    let digests: BTreeSet<[u64; 4]> =
        pages.iter().map(|page| [32, 40, 48, 56].map(|at| number(page, at))).collect();
    assert_eq!((pages.len(), digests.len()), (2, 2));
    assert!(opened[0].ticket() != opened[1].ticket() && *opened[0].ticket() != granted.token);
}

#[test]
fn many_views_are_opened_at_once() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    let _driver = pair.driver();
    std::thread::scope(|scope| {
        let open = || {
            let opened = pair.open(&request(Rights::ReadWrite)).unwrap();
            assert!(!opened.ended());
            opened
        };
        let threads: Vec<_> = (0..8).map(|_| scope.spawn(open)).collect();
        let opened: Vec<OpenView> =
            threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(pair.counts(), (16, 16));
        for opened in opened {
            scope.spawn(move || drop(opened));
        }
    });
    wait_for("the devices to go", || pair.counts() == (0, 0));
}

#[test]
fn revoking_a_grant_takes_the_devices_away_before_it_is_confirmed() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    let _driver = pair.driver();
    let granted = pair.broker.grant(&GrantRequest { uses: 2, ..request(Rights::ReadOnly) });
    let open =
        || pair.introspector.open(&granted.token, &caller(), false, MappedBy::Module).unwrap();
    let opened = [open(), open()];
    let other = pair.open(&request(Rights::ReadOnly)).unwrap();
    assert_eq!(pair.counts().0, 6);
    let pages = pages(pair.qemu.process.id());
    let revoked = pair.broker.revoke(granted.grant);
    assert_eq!((revoked.views, revoked.unconfirmed), (2, 0));
    assert_eq!(pair.counts().0, 2);
    assert_eq!(pages.iter().filter(|page| state(page) == STATE_REVOKED).count(), 2);
    assert!(opened.iter().all(OpenView::ended) && !other.ended());
}

#[test]
fn a_target_that_goes_takes_its_views_along() {
    let Some(mut pair) = Pair::start(OnSilence::Report) else { return };
    let _driver = pair.driver();
    let opened = pair.open(&request(Rights::ReadOnly)).unwrap();
    let [page] = &pages(pair.qemu.process.id())[..] else { panic!() };
    drop(pair.target.take());
    wait_for("the view to end", || opened.ended() && pair.counts() == (0, 0));
    assert_eq!(state(page), STATE_GONE);
}

#[test]
fn a_guest_that_keeps_its_devices_is_reported_and_tried_again() {
    let Some(pair) = Pair::start_with(OnSilence::Report, short_confirmation()) else { return };
    let audit = pair.broker.directory.path().join("audit");
    pair.broker.state.write_audit_to(&audit).unwrap();
    let driver = pair.driver();
    let opened = pair.open(&request(Rights::ReadOnly)).unwrap();
    drop(driver);
    let grant = pair.broker.grants()[0].id;
    let revoked = pair.broker.revoke(grant);
    assert_eq!((revoked.views, revoked.unconfirmed), (1, 1));
    assert!(opened.ended());
    let silent = || {
        let audit = std::fs::read_to_string(&audit).unwrap();
        audit.lines().find(|line| line.contains("\"event\":\"silent\"")).map(str::to_owned)
    };
    wait_for("the policy to be applied", || silent().is_some());
    let silent = silent().unwrap();
    for words in ["\"by\":\"watcher\"", "\"policy\":\"report\"", "the grant was revoked"] {
        assert!(silent.contains(words), "{silent}");
    }
    drop(opened);
    assert_eq!(pair.counts().0, 2);
    assert_eq!(pair.broker.grants()[0].views.len(), 1);
    // It releases them in the end.
    let _driver = pair.driver();
    wait_long("the devices to go", || pair.counts() == (0, 0));
    wait_for("the late confirmation", || {
        pair.broker.grants().iter().all(|grant| grant.views.is_empty())
    });
}

#[test]
fn a_silent_guest_is_paused_or_killed_where_the_operator_wants_it() {
    let Some(pair) = Pair::start_with(OnSilence::Pause, short_confirmation()) else { return };
    let driver = pair.driver();
    let opened = pair.open(&request(Rights::ReadOnly)).unwrap();
    drop(driver);
    let grant = pair.broker.grants()[0].id;
    assert_eq!(pair.broker.revoke(grant).unconfirmed, 1);
    pair.monitor.lock().unwrap().wait_status("paused");
    drop((opened, pair));

    let Some(pair) = Pair::start(OnSilence::Kill) else { return };
    let driver = pair.driver();
    let opened = pair.open(&request(Rights::ReadOnly)).unwrap();
    drop(driver);
    let grant = pair.broker.grants()[0].id;
    assert_eq!(pair.broker.revoke(grant).unconfirmed, 0);
    wait_for("the introspector to go", || pair.broker.service.introspector(CID).is_none());
    wait_for("the view to end", || opened.ended());
}

#[test]
fn a_reset_ends_all_views() {
    let Some(pair) = Pair::start(OnSilence::Kill) else { return };
    let driver = pair.driver();
    let opened = pair.open(&request(Rights::ReadOnly)).unwrap();
    drop(driver);
    pair.reset();
    wait_for("the view to end", || opened.ended());
    // QEMU does at the next reset what the guest was asked for.
    wait_long("the devices to go", || {
        pair.reset();
        pair.counts() == (0, 0)
    });
    drop(opened);
    let _driver = pair.driver();
    // The firmware resets the VM by itself once more where it finds that it has run before, and
    // that ends views, too.
    wait_for("a view to open", || match pair.open(&request(Rights::ReadOnly)) {
        Ok(_) => true,
        Err(OpenError::Ended) => false,
        Err(error) => panic!("{error}"),
    });
}

#[test]
fn a_guest_that_unplugs_by_itself_has_no_view() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    let driver = pair.driver();
    let opened = pair.open(&request(Rights::ReadOnly)).unwrap();
    drop(driver);
    let mut monitor = pair.monitor.lock().unwrap();
    let slots = slots(&mut monitor);
    eject(&mut monitor, slots);
    drop(monitor);
    wait_for("the view to end", || opened.ended() && pair.counts() == (0, 0));
}

#[test]
fn a_driver_that_complains_or_is_not_there_is_told_apart() {
    let Some(pair) = Pair::start(OnSilence::Report) else { return };
    std::thread::scope(|scope| {
        let complain = || {
            let pid = pair.qemu.process.id();
            wait_long("the descriptor", || !pages(pid).is_empty());
            write(&pages(pid)[0], COMPLAINT_AT, &COMPLAINT_NO_ADDRESS.to_le_bytes());
        };
        scope.spawn(complain);
        let error = pair.open(&request(Rights::ReadOnly)).unwrap_err();
        assert!(matches!(error, OpenError::Complaint(_)), "{error}");
    });
    let error = pair.open(&request(Rights::ReadOnly)).unwrap_err();
    assert!(matches!(error, OpenError::Silent), "{error}");
    let _driver = pair.driver();
    wait_long("the devices to go", || pair.counts() == (0, 0));
}

#[test]
fn a_new_broker_clears_away_what_an_old_one_left() {
    let Some(mut pair) = Pair::start(OnSilence::Report) else { return };
    let driver = pair.driver();
    let opened = pair.open(&request(Rights::ReadOnly)).unwrap();
    drop(driver);
    // As if the broker had been killed: QEMU is not told.
    pair.broker.admin().remove_introspector("watcher").unwrap();
    drop(opened);
    assert_eq!(pair.counts(), (2, 2));
    assert!(pair.broker.service.introspector(CID).is_none());
    wait_for("its name to be free", || add(&pair.broker, &pair.qemu, OnSilence::Report).is_ok());
    let _driver = pair.driver();
    wait_long("the devices to go", || pair.counts() == (0, 0));
    pair.introspector = pair.broker.service.introspector(CID).unwrap();
    drop(pair.open(&request(Rights::ReadOnly)).unwrap());
}

#[test]
fn the_end_of_qemu_is_the_introspectors_end() {
    let Some(mut pair) = Pair::start(OnSilence::Report) else { return };
    let driver = pair.driver();
    let opened = pair.open(&request(Rights::ReadOnly)).unwrap();
    drop(driver);
    pair.qemu.process.kill().unwrap();
    wait_for("the introspector to go", || pair.broker.service.introspector(CID).is_none());
    wait_for("its VM to go", || pair.broker.admin().targets().unwrap().len() == 1);
    wait_for("the view to end", || opened.ended());
    wait_for("the grants to have no view", || {
        pair.broker.grants().iter().all(|grant| grant.views.is_empty())
    });
}

#[test]
fn what_cannot_be_an_introspector_is_refused_with_a_remedy() {
    let broker = TestBroker::start();
    broker.service.set_guest_port(None);
    let refusal = |qemu: &Qemu, cid| {
        let which = qemu.socket();
        let (name, on_silence, trusted) = (None, OnSilence::Report, false);
        let request = IntrospectorRequest { which, cid, name, on_silence, trusted };
        match broker.admin().add_introspector(&request) {
            Err(ClientError::Refused { message, .. }) => message,
            other => panic!("{other:?}"),
        }
    };
    let Some(qemu) = Qemu::start(&broker, "portless", &["-machine", "q35", "-m", "64"]) else {
        return;
    };
    assert!(refusal(&qemu, Some(CID)).contains("root ports whose ids begin with kvmmem"));
    assert!(refusal(&qemu, None).contains("vhost-vsock-pci,guest-cid=N"));
    let port = "pcie-root-port,id=kvmmem0,slot=7,pref64-reserve=64M";
    let Some(qemu) =
        Qemu::start(&broker, "ported", &["-machine", "q35", "-m", "64", "-device", port])
    else {
        return;
    };
    let added = add(&broker, &qemu, OnSilence::Report).unwrap();
    assert_eq!(added.slot_count, 1);
    assert!(
        refusal(&qemu, Some(CID)).contains("answers")
            || refusal(&qemu, Some(CID)).contains("already")
    );
}
