// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMs under the stock QEMU of this machine, without hardware virtualisation: its firmware is guest enough.

mod common;

use std::time::Duration;

use common::qemu::{Qemu, add_confirmed, refusal, wait_long};
use common::{TestBroker, request, wait_for};
use kvmmem_broker::admin::{Added, Evidence, Region, Rights};
use kvmmem_broker::discover::discover;
use kvmmem_broker::host::{HostEvent, HostLink};

fn layout(low: u64, size: u64) -> Vec<Region> {
    let below = [
        Region { gpa: 0, len: 0xa_0000, offset: 0, file: 0 },
        Region { gpa: 0xc_0000, len: low - 0xc_0000, offset: 0xc_0000, file: 0 },
    ];
    let above = (size > low).then(|| Region { gpa: 1 << 32, len: size - low, offset: low, file: 0 });
    below.into_iter().chain(above).collect()
}

#[test]
fn layouts_by_qemu_and_by_confirmed_rules_are_the_same() {
    const GIB: u64 = 1 << 30;
    let broker = TestBroker::start();
    let cases = [
        ("q35", "512M", layout(GIB / 2, GIB / 2)),
        ("pc", "512M", layout(GIB / 2, GIB / 2)),
        // Sparse: the firmware touches next to none of it.
        ("q35", "5G", layout(2 * GIB, 5 * GIB)),
        ("pc", "5G", layout(3 * GIB, 5 * GIB)),
        ("q35,max-ram-below-4g=1G", "2G", layout(GIB, 2 * GIB)),
    ];
    for (machine, size, expected) in cases {
        let Some(qemu) = Qemu::shared(&broker, "vm", machine, size) else { return };
        let Added { target, regions, evidence } = add_confirmed(&broker, &qemu);
        assert_eq!((evidence, &regions), (Evidence::RulesAndAcpi, &expected), "{machine} {size}");
        assert_eq!((target.name.as_str(), target.pid, target.vcpus), ("vm", qemu.process.id(), 1));
        broker.admin().remove_target("vm").unwrap();
        let added = broker.admin().add_target(&qemu.socket(), Some("other name")).unwrap();
        assert_eq!((added.evidence, &added.regions), (Evidence::Qmp, &expected), "{machine} {size}");
        assert_eq!(added.target.name, "other name");
        let message = refusal(&broker, &qemu.pid());
        assert!(message.contains("registered already, as \"other name\""), "{message}");
        drop(qemu);
        wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
    }
}

#[test]
fn a_view_shows_the_firmwares_tables_until_qemu_ends() {
    let broker = TestBroker::start();
    let Some(qemu) = Qemu::shared(&broker, "seen", "q35", "64M") else { return };
    add_confirmed(&broker, &qemu);
    let terms = kvmmem_broker::admin::GrantRequest { target: "seen".into(), ..request(Rights::ReadOnly) };
    let token = broker.grant(&terms).token;
    let (mut link, view) = HostLink::attach(&broker.path, &token, true).unwrap();
    let region = view.regions.iter().find(|region| region.gpa == 0xc_0000).unwrap();
    let mut bios = vec![0; 0x2_0000];
    let offset = region.offset + (0xe_0000 - region.gpa);
    rustix::io::pread(&view.files[0], &mut bios, offset).unwrap();
    assert!(bios.chunks(16).any(|chunk| chunk.starts_with(b"RSD PTR ")));
    assert!(rustix::io::pwrite(&view.files[0], b"x", 0).is_err());
    drop(qemu);
    assert_eq!(link.wait(Duration::from_secs(10)).unwrap(), Some(HostEvent::Gone));
    wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
}

#[test]
fn a_reset_is_told_to_views() {
    let broker = TestBroker::start();
    let Some(qemu) = Qemu::shared(&broker, "seen", "q35", "64M") else { return };
    broker.admin().add_target(&qemu.socket(), None).unwrap();
    let terms = kvmmem_broker::admin::GrantRequest { target: "seen".into(), ..request(Rights::ReadOnly) };
    let (mut link, view) = HostLink::attach(&broker.path, &broker.grant(&terms).token, true).unwrap();
    let mut monitor = qemu.monitor();
    for later in 1..=2 {
        monitor.execute("system_reset", serde_json::json!({}));
        let expected =
            HostEvent::Changed { generation: view.generation + later, regions: view.regions.clone() };
        assert_eq!(link.wait(Duration::from_secs(10)).unwrap(), Some(expected));
    }
    // The broker's connection ends with the target: another client is heard then.
    broker.admin().remove_target("seen").unwrap();
    assert_eq!(link.wait(Duration::from_secs(10)).unwrap(), Some(HostEvent::Gone));
    kvmmem_broker::qmp::Qmp::connect(&qemu.qmp).unwrap();
}

#[test]
fn what_cannot_be_attached_is_found_with_a_reason_and_a_remedy() {
    let broker = TestBroker::start();
    let [a, b] = ["a", "b"].map(|id| format!("memory-backend-memfd,id={id},size=32M,share=on"));
    let file = broker.directory.path().join("ram");
    let in_file = format!("memory-backend-file,id=f,size=64M,share=on,mem-path={}", file.display());
    let cases: [(&str, Vec<&str>, &str); 4] = [
        ("private", vec!["-m", "64"], "private: no file of 64M"),
        (
            "nodes",
            vec![
                "-m",
                "64",
                "-object",
                &a,
                "-object",
                &b,
                "-numa",
                "node,memdev=a",
                "-numa",
                "node,memdev=b",
            ],
            "in 2 files",
        ),
        ("file", vec!["-m", "64", "-object", &in_file, "-machine", "pc,memory-backend=f"], "not sealed"),
        (
            "growable",
            vec![
                "-m",
                "64,slots=1,maxmem=128M",
                "-object",
                "memory-backend-memfd,id=g,size=64M,share=on",
                "-machine",
                "pc,memory-backend=g",
            ],
            "plugged in",
        ),
    ];
    for (name, arguments, words) in cases {
        let Some(qemu) = Qemu::start(&broker, name, &arguments) else { return };
        wait_long("QEMU to allocate", || refusal(&broker, &qemu.pid()).contains(words));
        let found = discover().unwrap().into_iter().find(|found| found.pid == qemu.process.id()).unwrap();
        assert_eq!((found.name.as_deref(), found.memory_bytes), (Some(name), Some(64 << 20)));
        assert_eq!(found.qmp.as_ref(), Some(&qemu.qmp));
        if name == "growable" {
            // Only its layout is in doubt, and QEMU knows it.
            assert!(found.attachable);
            broker.admin().add_target(&qemu.socket(), None).unwrap();
            broker.admin().remove_target(name).unwrap();
        } else {
            assert!(!found.attachable && found.reason.unwrap().contains(words));
            assert!(found.remedy.unwrap().contains("memory-backend-memfd,id=mem,size=64M,share=on"));
            let message = refusal(&broker, &qemu.socket());
            assert!(name != "private" || message.contains("start it with: -object"), "{message}");
        }
    }
    assert!(broker.admin().targets().unwrap().is_empty());
}
