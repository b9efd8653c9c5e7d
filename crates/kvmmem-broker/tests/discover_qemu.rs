// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMs under the stock QEMU of this machine, without hardware virtualisation: its firmware is guest
//! enough.

mod common;

use kvmmem_client::admin::{Evidence, NewTarget, Region, Rights, VmIdentity};

use common::qemu::{Qemu, add_confirmed, refusal, wait_long};
use common::{PATIENCE, TestBroker, Tool, request, wait_for};
use kvmmem::host::{HostEvent, HostLink, HostView};
use kvmmem_kvmi::request::Request;
use serde_json::json;

fn layout(low: u64, size: u64) -> Vec<Region> {
    let below = [
        Region { gpa: 0, len: 0xa_0000, offset: 0, file: 0 },
        Region { gpa: 0xc_0000, len: low - 0xc_0000, offset: 0xc_0000, file: 0 },
    ];
    let above =
        (size > low).then(|| Region { gpa: 1 << 32, len: size - low, offset: low, file: 0 });
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
        let NewTarget { target, regions, evidence, copied } = add_confirmed(&broker, &qemu);
        assert_eq!(copied, None);
        assert_eq!((evidence, &regions), (Evidence::RulesAndAcpi, &expected), "{machine} {size}");
        let VmIdentity { name, vcpus, .. } = &target.identity;
        assert_eq!((name.as_str(), target.pid, *vcpus), ("vm", qemu.process.id(), 1));
        broker.admin().remove_target("vm").unwrap();
        let added = broker.admin().add_target(&qemu.socket(), Some("other name")).unwrap();
        assert_eq!(
            (added.evidence, &added.regions),
            (Evidence::Qmp, &expected),
            "{machine} {size}"
        );
        assert_eq!(added.target.identity.name, "other name");
        let message = refusal(&broker, &qemu.pid());
        assert!(message.contains("registered already, as \"other name\""), "{message}");
        drop(qemu);
        wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
    }
}

/// The next event but those of resets: the firmware may reset its VM at any time.
fn event_but_resets(link: &mut HostLink) -> Option<HostEvent> {
    let is_reset = |event: &Option<HostEvent>| matches!(event, Some(HostEvent::Changed { .. }));
    std::iter::repeat_with(|| link.wait(PATIENCE).unwrap()).find(|event| !is_reset(event)).flatten()
}

#[test]
fn a_view_shows_the_firmwares_tables_until_qemu_ends() {
    let broker = TestBroker::start();
    let Some(qemu) = Qemu::shared(&broker, "seen", "q35", "64M") else { return };
    add_confirmed(&broker, &qemu);
    let (mut link, view) = attach(&broker, "seen");
    let region = view.regions.iter().find(|region| region.gpa == 0xc_0000).unwrap();
    let mut bios = vec![0; 0x2_0000];
    let offset = region.offset + (0xe_0000 - region.gpa);
    rustix::io::pread(&view.files[0], &mut bios, offset).unwrap();
    assert!(bios.chunks(16).any(|chunk| chunk.starts_with(b"RSD PTR ")));
    assert!(rustix::io::pwrite(&view.files[0], b"x", 0).is_err());
    drop(qemu);
    assert_eq!(event_but_resets(&mut link), Some(HostEvent::Gone));
    wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
}

#[test]
fn a_reset_is_told_to_views() {
    let broker = TestBroker::start();
    let Some(qemu) = Qemu::shared(&broker, "seen", "q35", "64M") else { return };
    broker.admin().add_target(&qemu.socket(), None).unwrap();
    let (mut link, view) = attach(&broker, "seen");
    let mut monitor = qemu.monitor();
    let mut last = view.generation;
    for _ in 1..=2 {
        monitor.execute("system_reset", json!({}));
        // It may be the firmware's.
        match link.wait(PATIENCE).unwrap() {
            Some(HostEvent::Changed { generation, regions }) => {
                assert!(generation > last && regions == view.regions);
                last = generation;
            }
            event => panic!("{event:?}"),
        }
    }
    // The broker's connection ends with the target: another client is heard then.
    broker.admin().remove_target("seen").unwrap();
    assert_eq!(event_but_resets(&mut link), Some(HostEvent::Gone));
    kvmmem_qemu::qmp::Qmp::connect(&qemu.qmp).unwrap();
}

/// Options for a backend that others can map.
fn backend(id: &str, size: &str) -> [String; 2] {
    ["-object".to_owned(), format!("memory-backend-memfd,id={id},size={size},share=on")]
}

/// Options for NUMA nodes with these backends.
fn nodes(ids: &[&str], size: &str) -> Vec<String> {
    let of = |id: &&str| {
        backend(id, size)
            .into_iter()
            .chain(["-numa".to_owned(), format!("node,memdev={id}")])
            .collect::<Vec<_>>()
    };
    ids.iter().flat_map(of).collect()
}

fn words(options: &[String]) -> Vec<&str> {
    options.iter().map(String::as_str).collect()
}

/// A view's bytes at a guest-physical address.
fn bytes(view: &HostView, gpa: u64, len: usize) -> Vec<u8> {
    let region = view
        .regions
        .iter()
        .find(|region| (region.gpa..region.gpa + region.len).contains(&gpa))
        .unwrap();
    let file = &view.files[usize::try_from(region.file).unwrap()];
    let mut bytes = vec![0; len];
    rustix::io::pread(file, &mut bytes, region.offset + (gpa - region.gpa)).unwrap();
    bytes
}

fn attach(broker: &TestBroker, target: &str) -> (HostLink, HostView) {
    let terms =
        kvmmem_client::admin::GrantRequest { target: target.into(), ..request(Rights::ReadOnly) };
    HostLink::attach(&broker.path, &broker.grant(&terms).token, true).unwrap()
}

#[test]
fn nodes_in_files_of_their_own_are_told_apart() {
    let broker = TestBroker::start();
    // The machine says which sizes they have; of two that are equal, the firmware's tables say
    // which is which.
    let small = [backend("a", "96M"), backend("b", "32M")].concat();
    let unequal = ["-numa", "node,memdev=a", "-numa", "node,memdev=b"].map(str::to_owned);
    for options in [nodes(&["a", "b"], "64M"), [small, unequal.to_vec()].concat()] {
        let arguments = [&["-m", "128M", "-machine", "q35"], words(&options).as_slice()].concat();
        let Some(qemu) = Qemu::start(&broker, "nodes", &arguments) else { return };
        let by_rules = add_confirmed(&broker, &qemu);
        assert_eq!((by_rules.evidence, by_rules.copied), (Evidence::RulesAndAcpi, None));
        let (link, view) = attach(&broker, "nodes");
        assert_eq!(view.files.len(), 2);
        assert!(
            bytes(&view, 0xe_0000, 0x2_0000).chunks(16).any(|chunk| chunk.starts_with(b"RSD PTR "))
        );
        drop(link);
        broker.admin().remove_target("nodes").unwrap();
        let by_qmp = broker.admin().add_target(&qemu.socket(), None).unwrap();
        assert_eq!((by_qmp.evidence, by_qmp.copied), (Evidence::Qmp, None));
        assert_eq!(by_qmp.regions, by_rules.regions);
        assert_eq!(by_qmp.regions.last().map(|region| region.file), Some(1));
        drop(qemu);
        wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
    }
    // Of the last two of three nothing but QEMU knows the order.
    let options = nodes(&["a", "b", "c"], "64M");
    let arguments =
        [&["-m", "192M", "-machine", "q35,max-ram-below-4g=64M"], words(&options).as_slice()]
            .concat();
    let Some(qemu) = Qemu::start(&broker, "three", &arguments) else { return };
    wait_long("the firmware to leave its tables", || {
        refusal(&broker, &qemu.pid()).contains("which of several mappings of 64M")
    });
    let added = broker.admin().add_target(&qemu.socket(), None).unwrap();
    let places: Vec<(u64, u64, u32)> =
        added.regions.iter().map(|r| (r.gpa, r.offset, r.file)).collect();
    assert_eq!(
        places,
        [(0, 0, 0), (0xc_0000, 0xc_0000, 0), (1 << 32, 0, 1), ((1 << 32) + (64 << 20), 0, 2)]
    );
}

#[test]
fn memory_that_is_plugged_in_makes_the_vm_another_target() {
    let broker = TestBroker::start();
    let options = [backend("g", "64M"), backend("d", "128M")].concat();
    let machine = ["-m", "64M,slots=4,maxmem=1G", "-machine", "q35,memory-backend=g"];
    let arguments =
        [&machine, words(&options).as_slice(), &["-device", "pc-dimm,memdev=d,id=dimm0"]].concat();
    let Some(qemu) = Qemu::start(&broker, "growable", &arguments) else { return };
    let message = refusal(&broker, &qemu.pid());
    assert!(message.contains("may have been plugged in"), "{message}");
    let added = broker.admin().add_target(&qemu.socket(), None).unwrap();
    let dimm = Region { gpa: 1 << 32, len: 128 << 20, offset: 0, file: 1 };
    assert_eq!((added.regions.last(), added.copied), (Some(&dimm), None));
    let (mut link, _view) = attach(&broker, "growable");
    let mut monitor = qemu.monitor();
    let object =
        json!({ "qom-type": "memory-backend-memfd", "id": "e", "size": 128 << 20, "share": true });
    monitor.execute("object-add", object);
    monitor.execute("device_add", json!({ "driver": "pc-dimm", "memdev": "e", "id": "dimm1" }));
    // No system in the guest takes it, so nothing is told; but this is.
    monitor.execute("stop", json!({}));
    assert_eq!(event_but_resets(&mut link), Some(HostEvent::Gone));
    let grown = || {
        let targets = broker.admin().targets().unwrap();
        targets.first().map(|vm| (vm.identity.uuid, vm.memory_bytes))
    };
    let expected = (added.target.identity.uuid, added.target.memory_bytes + (128 << 20));
    wait_for("the VM to be a target again", || grown() == Some(expected));
    let (_link, view) = attach(&broker, "growable");
    assert_eq!(
        (view.files.len(), view.regions.last().map(|region| region.gpa)),
        (3, Some((1 << 32) + (128 << 20)))
    );
}

#[test]
fn what_cannot_be_mapped_is_copied() {
    let broker = TestBroker::start();
    let file = broker.directory.path().join("ram");
    let in_file = format!("memory-backend-file,id=f,size=64M,share=on,mem-path={}", file.display());
    let halves = [
        "-object",
        "memory-backend-ram,id=a,size=32M",
        "-object",
        "memory-backend-ram,id=b,size=32M",
    ];
    let nodes = ["-numa", "node,memdev=a", "-numa", "node,memdev=b"];
    let cases: [(&str, Vec<&str>, &str); 4] = [
        ("private", vec![], "private: no file of 64M"),
        (
            "mixed",
            vec![
                "-object",
                "memory-backend-memfd,id=f,size=64M,share=off",
                "-machine",
                "pc,memory-backend=f",
            ],
            "private",
        ),
        ("file", vec!["-object", &in_file, "-machine", "pc,memory-backend=f"], "not sealed"),
        ("halves", [halves, nodes].concat(), "private: no file of 32M"),
    ];
    for (name, arguments, reason) in cases {
        let Some(qemu) =
            Qemu::start(&broker, name, &[&["-m", "64"], arguments.as_slice()].concat())
        else {
            return;
        };
        let by_rules = add_confirmed(&broker, &qemu);
        assert!(
            by_rules.copied.as_ref().is_some_and(|copied| copied.contains(reason)),
            "{by_rules:?}"
        );
        let found = qemu.found();
        assert_eq!((found.name.as_deref(), found.memory_bytes), (Some(name), Some(64 << 20)));
        assert_eq!(found.qmp.as_ref(), Some(&qemu.qmp));
        assert!(found.attachable && found.copied && found.reason.unwrap().contains(reason));
        let tool = Tool::listen(&broker, name);
        broker.admin().hook(name, &tool.endpoint).unwrap();
        let mut session = tool.accept();
        let pages = (0xe_0000..0x10_0000).step_by(0x1000);
        let bios: Vec<u8> = pages
            .flat_map(|gpa| session.ask(Request::ReadPhysical { gpa, size: 0x1000 }).unwrap())
            .collect();
        assert!(bios.chunks(16).any(|chunk| chunk.starts_with(b"RSD PTR ")));
        session.ask(Request::WritePhysical { gpa: 0x3f0_0000, data: b"stripes" }).unwrap();
        broker.admin().remove_target(name).unwrap();
        let by_qmp = broker.admin().add_target(&qemu.socket(), None).unwrap();
        assert_eq!((by_qmp.evidence, &by_qmp.regions), (Evidence::Qmp, &by_rules.regions));
        assert_eq!(by_qmp.copied, by_rules.copied);
        assert!(found.remedy.unwrap().contains("memory-backend-memfd,id="));
        drop(qemu);
        wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
    }
}

#[test]
fn huge_pages_are_no_obstacle() {
    let free = std::fs::read_to_string("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages");
    let free: u32 = free.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(0);
    if free < 32 {
        eprintln!(
            "skipped: 32 huge pages are not free, {free} are: sysctl vm.nr_hugepages=64 sets some aside"
        );
        return;
    }
    let broker = TestBroker::start();
    let backend = "memory-backend-memfd,id=h,size=64M,share=on,hugetlb=on";
    let arguments = ["-m", "64M", "-object", backend, "-machine", "q35,memory-backend=h"];
    let Some(qemu) = Qemu::start(&broker, "huge", &arguments) else { return };
    let by_rules = add_confirmed(&broker, &qemu);
    assert_eq!(by_rules.copied, None);
    let (_link, view) = attach(&broker, "huge");
    assert!(
        bytes(&view, 0xe_0000, 0x2_0000).chunks(16).any(|chunk| chunk.starts_with(b"RSD PTR "))
    );
}
