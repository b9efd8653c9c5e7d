// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which processes are VMMs, what they are called, and which continues a VM.

use std::path::PathBuf;

use kvmmem_client::ClientError;
use kvmmem_client::admin::{Evidence, Which};
use kvmmem_proto::message::Refusal;
use kvmmem_qemu::discover::discover;

use crate::common::{self, TestBroker, wait_for};
use crate::fake::{Fake, HONEST, refusal};

#[test]
fn other_vmms_are_found_and_refused_by_name() {
    let broker = TestBroker::start();
    for (program, arguments, name) in [
        ("crosvm", &["run", "--mem", "32"][..], "crosvm"),
        ("kvmmem", &["vm", "--name", "vm"][..], "registers its VM by itself"),
    ] {
        let fake = Fake::start_as(program, "sealed", arguments);
        let message = refusal(&broker, &Which::Pid(fake.pid()));
        assert!(message.contains(name), "{message}");
        let found = discover().unwrap().into_iter().find(|found| found.pid == fake.pid()).unwrap();
        assert!(!found.attachable && found.reason.unwrap().contains(name));
    }
}

#[test]
fn a_qemu_under_another_name_is_found() {
    let broker = TestBroker::start();
    for program in [".qemu-system-x86_64-wrapped", "qemu_patched"] {
        let fake = Fake::start_as(program, "sealed tables", HONEST);
        let found = discover().unwrap().into_iter().find(|found| found.pid == fake.pid()).unwrap();
        assert!(found.attachable && found.name.as_deref() == Some("fake"), "{found:?}");
        let added = broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
        assert_eq!(added.target.identity.name, "fake");
        assert_eq!(added.evidence, Evidence::RulesAndAcpi);
        drop(fake);
        wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
    }
    // Neither its name nor its memory is QEMU's.
    let fake = Fake::start_as("vmm", "sealed tables", HONEST);
    let message = refusal(&broker, &Which::Pid(fake.pid()));
    assert!(message.contains("\"vmm\", which is not a VMM that kvmmem knows"), "{message}");
    assert!(discover().unwrap().iter().all(|found| found.pid != fake.pid()));
    drop(fake);
    // Its memory is.
    let fake = Fake::start_as("vmm", "backend tables", HONEST);
    broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
    assert!(discover().unwrap().iter().any(|found| found.pid == fake.pid()));
}

#[test]
fn who_is_no_vmm_is_refused() {
    let broker = TestBroker::start();
    let message = refusal(&broker, &Which::Pid(std::process::id()));
    assert!(message.contains("is not a VMM"), "{message}");
    let mut fake = Fake::start("sealed tables", HONEST);
    fake.end();
    let message = refusal(&broker, &Which::Pid(fake.pid()));
    assert!(message.contains(&format!("no process {}", fake.pid())), "{message}");
    let message = refusal(&broker, &Which::Libvirt("../../x".into()));
    assert!(message.contains("libvirt runs no VM"), "{message}");
}

#[test]
fn only_what_was_added_is_removed() {
    let broker = TestBroker::start();
    let _own = broker.target("own");
    for (target, refusal) in [("own", Refusal::Denied), ("nobody", Refusal::Unknown)] {
        let refused = broker.admin().remove_target(target).unwrap_err();
        assert!(
            matches!(refused, ClientError::Refused { refusal: r, .. } if r == refusal),
            "{refused}"
        );
    }
    let fake = Fake::start("sealed tables", HONEST);
    broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
    broker.admin().remove_target("fake").unwrap();
    assert_eq!(broker.admin().targets().unwrap().len(), 1);
    broker.admin().add_target(&Which::Pid(fake.pid()), Some("again")).unwrap();
    // The broker ends at once, although a VM is left that has no connection.
    common::returns("the broker's end", move || drop(broker.stop()));
}

/// As in a live update: a QEMU that waits for a VM to come has mapped the memory of one whose VMM
/// ends.
#[test]
fn a_vm_continues_with_the_qemu_that_has_its_memory() {
    let broker = TestBroker::start();
    let old = ["first", "second", "third"].map(|name| {
        let fake = Fake::start("sealed tables", HONEST);
        broker.admin().add_target(&Which::Pid(fake.pid()), Some(name)).unwrap();
        fake
    });
    let ram = |fake: &Fake| {
        let files = std::fs::read_dir(format!("/proc/{}/fd", fake.pid())).unwrap();
        let mut paths = files.map(|file| file.unwrap().path());
        let is_ram = |path: &PathBuf| {
            std::fs::read_link(path)
                .is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:ram"))
        };
        paths.find(is_ram).unwrap().display().to_string()
    };
    let incoming = [HONEST, &["-incoming", "defer"]].concat();
    let new = [&old[1], &old[0]].map(|fake| Fake::start(&ram(fake), &incoming));
    // It has the memory of none.
    let _other = Fake::start("sealed", &incoming);
    drop(old);
    let expected = [("first".to_owned(), new[1].pid()), ("second".to_owned(), new[0].pid())];
    let targets =
        || broker.admin().targets().unwrap().into_iter().map(|vm| (vm.identity.name, vm.pid));
    wait_for("the VMs to have other VMMs", || targets().eq(expected.clone()));
    drop(new);
    wait_for("the VMs to go", || targets().len() == 0);
}

/// What a QEMU is called on its command line.
fn called(name: &str) -> Fake {
    let name = format!("guest={name}");
    Fake::start("sealed tables", &["-name", &name, "-m", "32", "-machine", "q35"])
}

#[test]
fn vms_whose_names_are_too_long_are_added_under_different_ones() {
    let broker = TestBroker::start();
    let start = "n".repeat(63);
    let long = [format!("{start}-one"), format!("{start}-two"), "虚拟".repeat(15)];
    let fakes = long.clone().map(|name| called(&name));
    let added = fakes.each_ref().map(|fake| {
        broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap().target.identity.name
    });
    assert!(added.iter().all(|name| name.len() <= 63 && name.contains('~')), "{added:?}");
    assert!(added[0] != added[1] && added[2].starts_with("虚拟虚拟"), "{added:?}");
    // Each is found by that name, and has it again the next time.
    for (name, fake) in added.iter().zip(&fakes) {
        broker.admin().remove_target(name).unwrap();
        let again = broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
        assert_eq!(again.target.identity.name, *name);
    }
}

#[test]
fn a_vm_that_is_called_as_another_s_uuid_needs_another_name() {
    let broker = TestBroker::start();
    let bank = broker.target("bank");
    let uuid = common::uuid("bank");
    for name in [uuid.to_string(), uuid.simple().to_string(), uuid.braced().to_string()] {
        let fake = called(&name);
        let message = refusal(&broker, &Which::Pid(fake.pid()));
        assert!(message.contains("UUID") && message.contains("--name"), "{message}");
        broker.admin().add_target(&Which::Pid(fake.pid()), Some("other")).unwrap();
        broker.admin().remove_target("other").unwrap();
    }
    drop(bank);
}
