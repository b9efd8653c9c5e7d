// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any command line, list of mappings and memory tree of a VMM. What is made of them for a guest's
//! RAM is refused, or a memory map.
#![no_main]

use kvmmem_proto::map::MemoryMap;
use kvmmem_qemu::command_line::CommandLine;
use kvmmem_qemu::layout::{self, Layout};
use kvmmem_qemu::qmp::questions::{MemoryBackend, MemoryDevice, MemorySize};
use kvmmem_qemu::vmm::Vmm;
use kvmmem_qemu::{mapping, mtree};

use libfuzzer_sys::fuzz_target;
use serde_json::{from_value, json};

const VMMS: [Vmm; 5] =
    [Vmm::Qemu, Vmm::CloudHypervisor, Vmm::Crosvm, Vmm::Firecracker, Vmm::Kvmmem];

fuzz_target!(|bytes: &[u8]| {
    let text = String::from_utf8_lossy(bytes);
    for mapping in mapping::parse(&text) {
        assert!(mapping.hva.checked_add(mapping.len).is_some());
    }
    let words: Vec<String> = text.split(['\0', ' ']).map(str::to_owned).collect();
    for vmm in VMMS {
        let line = CommandLine::parse(vmm, &words);
        let (sizes, size) = (line.sizes(), line.memory.unwrap_or(0));
        let machine = line.machine.as_deref().unwrap_or("pc");
        if let Ok(low) = layout::low_end(machine, size, line.max_ram_below_4g) {
            check(layout::by_rules(low, sizes.unwrap_or_else(|| vec![size])));
        }
    }
    // The view as QEMU reports it, with all of its memory taken for RAM.
    let view = format!("FlatView #0\n AS \"memory\", root: system\n{text}");
    let Ok(view) = mtree::parse(&view) else { return };
    let mut backends: Vec<MemoryBackend> = Vec::new();
    for range in view.iter().filter(|range| range.is_memory) {
        let id = range.name.rsplit('/').next().unwrap_or_default();
        let size = range.offset.saturating_add(range.len);
        match backends.iter_mut().find(|backend| backend.id.as_deref() == Some(id)) {
            Some(backend) => backend.size = backend.size.max(size),
            None => {
                backends.push(MemoryBackend { id: Some(id.to_owned()), size, share: Some(true) })
            }
        }
    }
    let nodes: Vec<String> = backends.iter().filter_map(|backend| backend.id.clone()).collect();
    let all = backends.iter().fold(0u64, |sum, backend| sum.saturating_add(backend.size));
    let memory = MemorySize { base_memory: all, plugged_memory: 0 };
    if let Ok(layout) = layout::from_qemu(&view, &backends, &[], memory, &nodes) {
        check(layout);
    }
    // All but the first are plugged in.
    if let Some((first, others)) = nodes.split_first()
        && let Some(first) = backends.iter().find(|backend| backend.id.as_ref() == Some(first))
    {
        let device =
            |id: &String| json!({ "type": "dimm", "data": { "memdev": format!("/objects/{id}") } });
        let devices: Result<Vec<MemoryDevice>, _> =
            others.iter().map(|id| from_value(device(id))).collect();
        let memory = MemorySize { base_memory: first.size, ..memory };
        let devices = devices.expect("our own devices");
        if let Ok(layout) = layout::from_qemu(&view, &backends, &devices, memory, &[]) {
            check(layout);
        }
    }
});

fn check(layout: Layout) {
    if let Ok(map) = MemoryMap::new(layout.regions) {
        for region in map.regions() {
            assert_eq!(map.resolve(region.gpa), Some((region.file, region.offset)));
        }
    }
}
