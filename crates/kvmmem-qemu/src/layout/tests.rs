// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Layouts by the machine types' rules and by QEMU's answers.

use kvmmem_proto::map::MemoryMap;

use super::*;
use crate::qmp::questions::MemoryDeviceData;
use proptest::prelude::*;

const GIB: u64 = 1 << 30;

#[test]
fn the_rules_are_those_of_qemu() {
    let cases = [
        ("pc", 512 << 20, None, 512 << 20),
        ("pc", 3 * GIB, None, 3 * GIB),
        ("pc-i440fx-7.2", 0xdfff_0000, None, 0xdfff_0000),
        ("pc-i440fx-7.2", 0xe000_0000, None, 3 * GIB),
        ("pc-i440fx-2.4", 5 * GIB, None, 3 * GIB),
        ("pc", 4 * GIB, Some(2 * GIB), 2 * GIB),
        ("pc", 3968 << 20, Some(4 * GIB), 3968 << 20),
        ("q35", 512 << 20, None, 512 << 20),
        ("pc-q35-11.1", 0xafff_f000, None, 0xafff_f000),
        ("pc-q35-11.1", 0xb000_0000, None, 2 * GIB),
        ("q35", 5 * GIB, None, 2 * GIB),
        ("q35", 5 * GIB, Some(GIB), GIB),
    ];
    for (machine, size, limit, low) in cases {
        assert_eq!(low_end(machine, size, limit), Ok(low), "{machine} {size:#x}");
    }
    assert!(matches!(low_end("microvm", GIB, None), Err(LayoutError::Machine(_))));
    assert!(matches!(low_end("q35", 2 << 40, None), Err(LayoutError::Large(_))));
}

fn range(gpa: u64, end: u64, offset: u64, name: &str) -> FlatRange {
    FlatRange { gpa, len: end - gpa, is_memory: true, name: name.to_owned(), offset }
}

fn backend(id: &str, size: u64) -> MemoryBackend {
    MemoryBackend { id: Some(id.to_owned()), size, share: Some(true) }
}

fn device(kind: &str, memdev: &str) -> MemoryDevice {
    let data = MemoryDeviceData { memdev: Some(memdev.to_owned()) };
    MemoryDevice { kind: kind.to_owned(), data }
}

fn memory(base_memory: u64, plugged_memory: u64) -> MemorySize {
    MemorySize { base_memory, plugged_memory }
}

#[test]
fn what_qemu_says_is_what_the_rules_say() {
    for name in ["mem", "/objects/mem"] {
        let view = [
            range(0, 0xc_3000, 0, name),
            range(0xc_3000, 0xe_8000, 0xc_3000, name),
            range(0xf_0000, 0x10_0000, 0, "pc.bios"),
            range(0x10_0000, 2 * GIB, 0x10_0000, name),
            range(0xfd00_0000, 0xfe00_0000, 0, "vga.vram"),
            range(4 * GIB, 7 * GIB, 2 * GIB, name),
        ];
        let said =
            from_qemu(&view, &[backend("mem", 5 * GIB)], &[], memory(5 * GIB, 0), &[]).unwrap();
        assert_eq!(said, by_rules(2 * GIB, vec![5 * GIB]));
        assert_eq!(said.regions.len(), 3);
        assert_eq!(MemoryMap::new(said.regions).unwrap().resolve(4 * GIB), Some((0, 2 * GIB)));
    }
}

#[test]
fn without_a_chipset_low_ram_ends_at_a_hole() {
    let sizes = |vmm, size| {
        let sizes = of_micro(vmm, size).into_iter().map(|layout| layout.sizes);
        sizes.collect::<Vec<_>>()
    };
    assert_eq!(sizes(Vmm::CloudHypervisor, GIB), [[GIB]]);
    assert_eq!(sizes(Vmm::Firecracker, 3 * GIB), [[3 * GIB]]);
    assert_eq!(sizes(Vmm::CloudHypervisor, 4 * GIB), [[3 * GIB, GIB]]);
    assert_eq!(sizes(Vmm::Firecracker, 4 * GIB), [[3 * GIB, GIB], [3328 << 20, 768 << 20]]);
    assert_eq!(sizes(Vmm::Firecracker, 3100 << 20), [vec![3 * GIB, 28 << 20], vec![3100 << 20]]);
    let [layout] = of_micro(Vmm::CloudHypervisor, 5 * GIB).try_into().unwrap();
    let map = MemoryMap::new(layout.regions).unwrap();
    assert_eq!((map.resolve(4 * GIB), map.resolve(3 * GIB)), (Some((1, 0)), None));
}

#[test]
fn nodes_follow_each_other_on_both_sides_of_the_hole() {
    let view = [
        range(0, 0xa_0000, 0, "b"),
        range(0x10_0000, GIB, 0x10_0000, "b"),
        range(GIB, 2 * GIB, 0, "a"),
        range(4 * GIB, 5 * GIB, GIB, "a"),
        range(5 * GIB, 8 * GIB, 0, "c"),
    ];
    let backends = [backend("a", 2 * GIB), backend("b", GIB), backend("c", 3 * GIB)];
    let nodes = ["b", "a", "c"].map(str::to_owned);
    let said = from_qemu(&view, &backends, &[], memory(6 * GIB, 0), &nodes).unwrap();
    assert_eq!(said, by_rules(2 * GIB, vec![GIB, 2 * GIB, 3 * GIB]));
    let map = MemoryMap::new(said.regions).unwrap();
    let places = [0xf_0000, GIB, 4 * GIB, 5 * GIB].map(|gpa| map.resolve(gpa));
    assert_eq!(places, [Some((0, 0xf_0000)), Some((1, 0)), Some((1, GIB)), Some((2, 0))]);
    let refused =
        |nodes: &[String]| from_qemu(&view, &backends, &[], memory(6 * GIB, 0), nodes).unwrap_err();
    assert_eq!(refused(&[]), LayoutError::Incomplete { all: 6 * GIB, found: GIB });
    assert_eq!(refused(&["x".to_owned()]), LayoutError::NoBackend("x".into()));
}

#[test]
fn of_devices_only_dimms_are_ram() {
    let view = [
        range(0, GIB, 0, "mem"),
        // A window that shows another VM's memory.
        range(GIB, 2 * GIB, 0, "window"),
        range(4 * GIB, 5 * GIB, 0, "d"),
        range(6 * GIB, 7 * GIB, 0, "n"),
    ];
    let backends =
        [backend("mem", GIB), backend("window", GIB), backend("d", GIB), backend("n", GIB)];
    let ask =
        |devices: &[MemoryDevice]| from_qemu(&view, &backends, devices, memory(GIB, GIB), &[]);
    let dimm = device("dimm", "/objects/d");
    let layout = ask(&[dimm.clone(), device("nvdimm", "/objects/n")]).unwrap();
    assert_eq!(layout.sizes, [GIB, GIB]);
    assert_eq!(
        layout.regions.last().unwrap(),
        &Region { gpa: 4 * GIB, len: GIB, offset: 0, file: 1 }
    );
    assert!(layout.regions.iter().all(|region| region.gpa < GIB || region.file == 1));
    let error = ask(&[device("virtio-mem", "/objects/d")]).unwrap_err();
    assert_eq!(error, LayoutError::Device("virtio-mem".into()));
    assert_eq!(
        ask(&[device("dimm", "/objects/x")]).unwrap_err(),
        LayoutError::NoBackend("x".into())
    );
    let many = vec![dimm; MAX_FILES];
    assert_eq!(ask(&many).unwrap_err(), LayoutError::TooMany(MAX_FILES + 1));
}

proptest! {
    #[test]
    fn any_view_gives_a_map_or_an_error(
        numbers in proptest::collection::vec((0u64..0x200, 1u64..0x100, 0u64..0x200), 0..6),
        odd in 0u64..0x1000,
    ) {
        let mut end = 0;
        let mut view = Vec::new();
        for (gap, len, offset) in numbers {
            let gpa = if view.is_empty() { 0 } else { end + (gap << 12) + odd };
            end = gpa + (len << 12);
            view.push(range(gpa, end, (offset << 12) + odd, "m"));
        }
        if let Ok(Layout { regions, .. }) = from_qemu(&view, &[backend("m", 1 << 21)], &[], memory(1 << 21, 0), &[]) {
            prop_assert!(regions.iter().all(|r| r.gpa % 4096 == 0 && r.len % 4096 == 0 && r.len > 0));
            prop_assert!(regions.iter().all(|r| r.gpa + r.len <= VGA || r.gpa >= ROM));
            // The rest is the registry's to judge, which takes no map that breaks a rule.
            let _ = MemoryMap::new(regions);
        }
    }

    #[test]
    fn the_rules_make_maps(
        sizes in proptest::collection::vec(512u64..0x20_0000, 1..5),
        limit in proptest::option::of(0x1000u64..0x10_0000),
        q35: bool,
    ) {
        let (sizes, limit) = (sizes.iter().map(|size| size << 12).collect::<Vec<_>>(), limit.map(|limit| limit << 12));
        let size = sizes.iter().sum();
        let low = low_end(if q35 { "q35" } else { "pc" }, size, limit).unwrap();
        let map = MemoryMap::new(by_rules(low, sizes.clone()).regions).unwrap();
        prop_assert_eq!(map.memory_bytes(), size - (ROM - VGA));
        prop_assert!((0..).zip(&sizes).all(|(file, size)| map.file_size(file) == *size));
    }
}
