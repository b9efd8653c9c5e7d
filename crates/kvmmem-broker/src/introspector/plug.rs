// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The devices of one view, as QEMU is told to make and to unmake them.
//!
//! Of each slot the functions with windows are plugged first: the guest sees nothing of them before
//! function 0 is there, and then sees all. What was begun is written down before it is done, so
//! that [`Plug::unplug`] and [`Plug::remove_objects`] undo it from any point on.

use std::os::fd::BorrowedFd;

use kvmmem_abi::descriptor::SLOT_WINDOWS;
use kvmmem_proto::map::PAGE_SIZE;
use serde_json::{Value, json};

use super::monitor::{Monitor, MonitorError};
use super::pci_slots::PciSlot;
use super::window_layout::Window;

/// What QEMU says of what is not there.
const NOT_FOUND: &str = "not found";

/// Ids of ours begin like this.
pub(super) const PREFIX: &str = "kvmmem-view-";

/// The devices of a view.
#[derive(Debug, Default)]
pub(super) struct Plug {
    slots: Vec<Slot>,
}

/// A PCI slot.
#[derive(Debug)]
struct Slot {
    functions: Vec<Function>,
}

/// A function, and its memory backend, which has the same id.
#[derive(Debug)]
struct Function {
    id: String,
    /// Its number; 0 is the slot's descriptor.
    number: u32,
    has_device: bool,
    has_object: bool,
}

/// What is plugged in.
pub(super) struct Shown<'a> {
    /// What the ids have behind [`PREFIX`]; of no other view.
    pub(super) name: String,
    /// The slots, in their order.
    pub(super) places: &'a [PciSlot],
    /// The descriptor page of each.
    pub(super) pages: Vec<BorrowedFd<'a>>,
    /// The target's files that windows are in, by their number.
    pub(super) files: Vec<(u32, BorrowedFd<'a>)>,
    pub(super) windows: &'a [Window],
    pub(super) is_read_only: bool,
    /// Whether QEMU knows `offset`.
    pub(super) has_offset: bool,
}

/// How many slots so many windows take.
pub(super) fn slots_of(windows: usize) -> usize {
    windows.div_ceil(SLOT_WINDOWS as usize)
}

impl Plug {
    /// What is there of views that nobody knows any more: the devices and the objects that QEMU
    /// lists.
    pub(super) fn left_over(devices: &[String], objects: &[String]) -> Self {
        let mut slots: Vec<(String, Slot)> = Vec::new();
        let mut ids: Vec<&String> = devices.iter().chain(objects).collect();
        ids.sort_unstable();
        ids.dedup();
        for id in ids {
            let Some((slot, number)) = id.strip_prefix(PREFIX).and_then(|id| id.rsplit_once('f'))
            else {
                continue;
            };
            let Ok(number) = number.parse() else { continue };
            let has = |list: &[String]| list.iter().any(|other| other == id);
            let (has_device, has_object) = (has(devices), has(objects));
            let function = Function { id: id.clone(), number, has_device, has_object };
            match slots.last_mut().filter(|(name, _)| name == slot) {
                Some((_, slot)) => slot.functions.push(function),
                None => slots.push((slot.to_owned(), Slot { functions: vec![function] })),
            }
        }
        Self { slots: slots.into_iter().map(|(_, slot)| slot).collect() }
    }

    /// Plugs a view in; `goes_on` is asked before each step. What is there after an error is the
    /// caller's to undo.
    pub(super) fn plug(
        &mut self,
        monitor: &Monitor,
        shown: &Shown<'_>,
        goes_on: impl Fn() -> bool,
    ) -> Result<(), MonitorError> {
        let mut sets = Vec::new();
        let done = self.plug_from(monitor, shown, &goes_on, &mut sets);
        // The backends have opened the files for themselves.
        for set in sets {
            // One that cannot be removed goes with the connection.
            let _ = monitor.execute("remove-fd", json!({ "fdset-id": set }));
        }
        done
    }

    fn plug_from(
        &mut self,
        monitor: &Monitor,
        shown: &Shown<'_>,
        goes_on: &impl Fn() -> bool,
        sets: &mut Vec<u64>,
    ) -> Result<(), MonitorError> {
        let mut open = |file: BorrowedFd<'_>| -> Result<String, MonitorError> {
            let added = monitor.add_fd(file)?;
            sets.push(added.fdset_id);
            Ok(format!("/proc/self/fd/{}", added.fd))
        };
        let mut paths = Vec::new();
        for (number, file) in &shown.files {
            paths.push((*number, open(*file)?));
        }
        let per_slot = SLOT_WINDOWS as usize;
        // The first slot last: it has the ranges, and is what the guest's driver begins with.
        for (slot, (place, page)) in shown.places.iter().zip(&shown.pages).enumerate().rev() {
            self.slots.push(Slot { functions: Vec::new() });
            let id = |number: u32| format!("{PREFIX}{}s{slot}f{number}", shown.name);
            let windows = shown.windows.iter().skip(slot * per_slot).take(per_slot);
            for (number, window) in (1u32..).zip(windows) {
                let path = paths
                    .iter()
                    .find(|(file, _)| *file == window.file)
                    .map(|(_, path)| path.as_str());
                let mut backend = backend(path.unwrap_or_default(), window.len, shown.is_read_only);
                if shown.has_offset {
                    backend["offset"] = window.offset.into();
                }
                if !goes_on() {
                    return Ok(());
                }
                self.add(monitor, id(number), number, backend, place)?;
            }
            let path = open(*page)?;
            if !goes_on() {
                return Ok(());
            }
            self.add(monitor, id(0), 0, backend(&path, PAGE_SIZE, false), place)?;
        }
        Ok(())
    }

    fn add(
        &mut self,
        monitor: &Monitor,
        id: String,
        number: u32,
        mut backend: Value,
        place: &PciSlot,
    ) -> Result<(), MonitorError> {
        let Some(slot) = self.slots.last_mut() else { return Ok(()) };
        let device = json!({
            "driver": "ivshmem-plain", "id": id, "memdev": id,
            "bus": place.bus, "addr": format!("{:#x}.{number}", place.slot), "multifunction": number == 0,
        });
        backend["id"] = id.clone().into();
        slot.functions.push(Function { id, number, has_device: false, has_object: true });
        let Some(function) = slot.functions.last_mut() else { return Ok(()) };
        // Where QEMU does not answer, it may have done it.
        if let Err(error) = monitor.execute("object-add", backend) {
            function.has_object = !error.is_refusal();
            return Err(error);
        }
        monitor.watch(&function.id);
        function.has_device = true;
        if let Err(error) = monitor.execute("device_add", device) {
            if error.is_refusal() {
                function.lose_device(monitor);
            }
            return Err(error);
        }
        Ok(())
    }

    /// Asks the guest to let go of what is plugged in; may be repeated.
    pub(super) fn unplug(&mut self, monitor: &Monitor) {
        for slot in &mut self.slots {
            slot.take_note(monitor);
            // The guest lets go of a slot as a whole. What it has never seen has to be taken out
            // one by one.
            let has_first =
                slot.functions.iter().any(|function| function.has_device && function.number == 0);
            let meant = |function: &&mut Function| {
                function.has_device && (function.number == 0 || !has_first)
            };
            for function in slot.functions.iter_mut().filter(meant) {
                match monitor.execute("device_del", json!({ "id": function.id })) {
                    Err(error) if error.says(NOT_FOUND) => function.lose_device(monitor),
                    // Asked for already, or nobody answers: it is tried again.
                    Ok(_) | Err(_) => {}
                }
            }
        }
    }

    /// The devices that the guest can reach.
    pub(super) fn devices(&mut self, monitor: &Monitor) -> Vec<String> {
        self.slots.iter_mut().for_each(|slot| slot.take_note(monitor));
        let functions = self.slots.iter().flat_map(|slot| &slot.functions);
        functions
            .filter(|function| function.has_device)
            .map(|function| function.id.clone())
            .collect()
    }

    /// Whether the guest has unplugged something by itself.
    pub(super) fn is_damaged(&self, monitor: &Monitor) -> bool {
        let mut functions = self.slots.iter().flat_map(|slot| &slot.functions);
        functions.any(|function| function.has_device && monitor.is_deleted(&function.id))
    }

    /// Removes the backends whose devices are gone, as far as QEMU lets go of them now; whether
    /// nothing is left at all.
    pub(super) fn remove_objects(&mut self, monitor: &Monitor) -> bool {
        let mut is_done = true;
        for function in self.slots.iter_mut().flat_map(|slot| &mut slot.functions) {
            if function.has_object && !function.has_device {
                match monitor.execute("object-del", json!({ "id": function.id })) {
                    Err(error) if !error.says(NOT_FOUND) => {}
                    Ok(_) | Err(_) => function.has_object = false,
                }
            }
            is_done &= !function.has_device && !function.has_object;
        }
        is_done
    }
}

impl Slot {
    /// Takes note of the devices that are gone.
    fn take_note(&mut self, monitor: &Monitor) {
        for function in &mut self.functions {
            if function.has_device && monitor.is_deleted(&function.id) {
                function.lose_device(monitor);
            }
        }
    }
}

impl Function {
    fn lose_device(&mut self, monitor: &Monitor) {
        self.has_device = false;
        monitor.forget(&self.id);
    }
}

/// A memory backend but for its id and its place in the file.
fn backend(path: &str, size: u64, is_read_only: bool) -> Value {
    json!({
        "qom-type": "memory-backend-file", "mem-path": path, "size": size,
        "share": true, "readonly": is_read_only,
        // Whatever QEMU's own RAM has: none of the target's memory is touched, and none is in a dump of the introspector.
        "prealloc": false, "dump": false,
    })
}
