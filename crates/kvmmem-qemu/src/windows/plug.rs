// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The devices and memory backends of one view, as QEMU has been told to make and to unmake them.
//!
//! Of each slot the functions with windows are plugged first: the guest sees nothing of them before
//! function 0 is there, and then sees all. Each step is written down before it is done, so that
//! what [`Plug`] lists as left undoes it from any point on. No command is sent with the lock on a
//! `Plug` held.

use std::collections::BTreeSet;
use std::os::fd::BorrowedFd;
use std::sync::{Mutex, MutexGuard, PoisonError};

use kvmmem_abi::descriptor::SLOT_WINDOWS;
use kvmmem_proto::map::PAGE_SIZE;
use serde_json::{Value, json};

use super::layout::Window;
use super::pci_slots::PciSlot;
use crate::qmp::{Qmp, QmpError};

/// What QEMU says of what is not there.
const NOT_FOUND: &str = "not found";

/// Ids of ours begin like this.
pub(super) const PREFIX: &str = "kvmmem-view-";

/// Ids of marks begin like this.
const MARK: &str = "kvmmem-mark-";

/// What a mark is: the smallest object that QEMU has.
pub(super) const MARK_TYPE: &str = "rng-builtin";

/// The devices of a view.
#[derive(Debug, Default)]
pub struct Plug {
    slots: Vec<Slot>,
    /// The marks of its buses, which go last.
    marks: Vec<Mark>,
}

/// An object in QEMU that says that a bus must not be used again before the VM is reset, or before
/// the tool that has mapped its devices without the driver has acknowledged that it has not any
/// more. It outlasts the broker.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mark {
    /// The object's id.
    pub id: String,
    /// The bus.
    pub bus: String,
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

impl Mark {
    /// The mark of a view with this name, which no other one has, on a bus.
    fn new(name: &str, bus: &str) -> Self {
        Self { id: format!("{MARK}{name}-on-{bus}"), bus: bus.to_owned() }
    }

    /// The mark that an object with this id is.
    pub(super) fn from_id(id: &str) -> Option<Self> {
        let (_, bus) = id.strip_prefix(MARK)?.split_once("-on-")?;
        Some(Self { id: id.to_owned(), bus: bus.to_owned() })
    }
}

/// What a view is to be plugged in with.
pub struct PlugRequest<'a> {
    /// A name that no other view has; the ids of its devices are made of it.
    pub name: String,
    /// The slots, in their order.
    pub slots: &'a [PciSlot],
    /// The descriptor page of each.
    pub pages: Vec<BorrowedFd<'a>>,
    /// The target's files that windows are in, by their number.
    pub files: Vec<(u32, BorrowedFd<'a>)>,
    /// The windows, of which each slot takes its share.
    pub windows: &'a [Window],
    /// Whether the guest may only read.
    pub is_read_only: bool,
    /// Whether QEMU knows `offset`.
    pub has_offset: bool,
    /// Whether the buses are marked.
    pub is_marked: bool,
}

/// How many slots so many windows take.
pub fn slots_of(windows: usize) -> usize {
    windows.div_ceil(SLOT_WINDOWS as usize)
}

/// Whether QEMU knows nothing of what it was to delete.
pub fn is_not_found<T>(answer: &Result<T, QmpError>) -> bool {
    answer.as_ref().is_err_and(|error| error.says(NOT_FOUND))
}

impl Plug {
    /// What an earlier broker has left of its views, by the devices and the objects that QEMU
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
        Self { slots: slots.into_iter().map(|(_, slot)| slot).collect(), marks: Vec::new() }
    }

    /// The devices for which the guest has to be asked: it releases a slot as a whole. What it
    /// has never seen has to be unplugged one by one.
    pub fn to_unplug(&self) -> Vec<String> {
        let mut ids = Vec::new();
        for slot in &self.slots {
            let has_first = slot.functions.iter().any(|it| it.has_device && it.number == 0);
            let meant =
                slot.functions.iter().filter(|it| it.has_device && (it.number == 0 || !has_first));
            ids.extend(meant.map(|function| function.id.clone()));
        }
        ids
    }

    /// The backends whose devices are gone, and the marks once all are.
    pub fn to_delete(&self) -> Vec<String> {
        let meant = self.functions().filter(|it| it.has_object && !it.has_device);
        let marks = self.marks.iter().filter(|_| !self.has_devices()).map(|mark| &mark.id);
        meant.map(|function| &function.id).chain(marks).cloned().collect()
    }

    /// Leaves the marks in QEMU, and returns them.
    pub fn leave_marks(&mut self) -> Vec<Mark> {
        std::mem::take(&mut self.marks)
    }

    /// Records that a device is gone; whether it was one of these.
    pub fn device_is_gone(&mut self, id: &str) -> bool {
        let function = self.find(id).filter(|function| function.has_device);
        function.map(|function| function.has_device = false).is_some()
    }

    /// Records that a backend or a mark is gone.
    pub fn object_is_gone(&mut self, id: &str) {
        self.marks.retain(|mark| mark.id != id);
        if let Some(function) = self.find(id) {
            function.has_object = false;
        }
    }

    /// Whether there are devices that the guest can reach.
    pub fn has_devices(&self) -> bool {
        self.functions().any(|function| function.has_device)
    }

    /// Whether nothing is left.
    pub fn is_empty(&self) -> bool {
        self.marks.is_empty()
            && !self.functions().any(|function| function.has_device || function.has_object)
    }

    fn functions(&self) -> impl Iterator<Item = &Function> {
        self.slots.iter().flat_map(|slot| &slot.functions)
    }

    fn find(&mut self, id: &str) -> Option<&mut Function> {
        self.slots.iter_mut().flat_map(|slot| &mut slot.functions).find(|it| it.id == id)
    }
}

/// Plugs a view in, which `plug` records; `goes_on` is asked before each step. What is there after
/// an error is the caller's to undo.
pub fn plug_in(
    plug: &Mutex<Plug>,
    qmp: &mut Qmp,
    shown: &PlugRequest<'_>,
    goes_on: impl Fn() -> bool,
) -> Result<(), QmpError> {
    let mut sets = Vec::new();
    let done = plug_from(plug, qmp, shown, &goes_on, &mut sets);
    // The backends have opened the files for themselves.
    for set in sets {
        // One that cannot be removed goes with the connection.
        let _ = qmp.execute("remove-fd", json!({ "fdset-id": set }));
    }
    done
}

fn plug_from(
    plug: &Mutex<Plug>,
    qmp: &mut Qmp,
    shown: &PlugRequest<'_>,
    goes_on: &impl Fn() -> bool,
    sets: &mut Vec<u64>,
) -> Result<(), QmpError> {
    let mut open = |qmp: &mut Qmp, file: BorrowedFd<'_>| -> Result<String, QmpError> {
        let added = qmp.add_fd(file, None)?;
        sets.push(added.fdset_id);
        Ok(format!("/proc/self/fd/{}", added.fd))
    };
    let buses: BTreeSet<&str> = shown.slots.iter().map(|slot| slot.bus.as_str()).collect();
    for bus in buses.into_iter().filter(|_| shown.is_marked) {
        let mark = Mark::new(&shown.name, bus);
        let id = mark.id.clone();
        lock(plug).marks.push(mark);
        if let Err(error) = qmp.execute("object-add", json!({ "qom-type": MARK_TYPE, "id": id })) {
            if error.is_refusal() {
                lock(plug).object_is_gone(&id);
            }
            return Err(error);
        }
    }
    let mut paths = Vec::new();
    for (number, file) in &shown.files {
        paths.push((*number, open(qmp, *file)?));
    }
    let per_slot = SLOT_WINDOWS as usize;
    // The first slot last: it has the ranges, and is what the guest's driver begins with.
    for (slot, (place, page)) in shown.slots.iter().zip(&shown.pages).enumerate().rev() {
        lock(plug).slots.push(Slot { functions: Vec::new() });
        let id = |number: u32| format!("{PREFIX}{}s{slot}f{number}", shown.name);
        let windows = shown.windows.iter().skip(slot * per_slot).take(per_slot);
        for (number, window) in (1u32..).zip(windows) {
            let path =
                paths.iter().find(|(file, _)| *file == window.file).map(|(_, path)| path.as_str());
            let mut backend = backend(path.unwrap_or_default(), window.len, shown.is_read_only);
            if shown.has_offset {
                backend["offset"] = window.offset.into();
            }
            if !goes_on() {
                return Ok(());
            }
            add(plug, qmp, id(number), number, backend, place)?;
        }
        let path = open(qmp, *page)?;
        if !goes_on() {
            return Ok(());
        }
        add(plug, qmp, id(0), 0, backend(&path, PAGE_SIZE, false), place)?;
    }
    Ok(())
}

fn add(
    plug: &Mutex<Plug>,
    qmp: &mut Qmp,
    id: String,
    number: u32,
    mut backend: Value,
    place: &PciSlot,
) -> Result<(), QmpError> {
    let device = json!({
        "driver": "ivshmem-plain", "id": id, "memdev": id,
        "bus": place.bus, "addr": format!("{:#x}.{number}", place.slot), "multifunction": number == 0,
    });
    backend["id"] = id.clone().into();
    if let Some(slot) = lock(plug).slots.last_mut() {
        let id = id.clone();
        slot.functions.push(Function { id, number, has_device: false, has_object: true });
    }
    // Where QEMU does not answer, it may have done it.
    if let Err(error) = qmp.execute("object-add", backend) {
        if error.is_refusal() {
            lock(plug).object_is_gone(&id);
        }
        return Err(error);
    }
    if let Some(function) = lock(plug).find(&id) {
        function.has_device = true;
    }
    if let Err(error) = qmp.execute("device_add", device) {
        if error.is_refusal() {
            lock(plug).device_is_gone(&id);
        }
        return Err(error);
    }
    Ok(())
}

/// A memory backend but for its id and its place in the file.
fn backend(path: &str, size: u64, is_read_only: bool) -> Value {
    json!({
        "qom-type": "memory-backend-file", "mem-path": path, "size": size,
        "share": true, "readonly": is_read_only,
        // Unlike the defaults of QEMU's own RAM: none of the target's memory is touched, and none
        // is in a dump of the introspector.
        "prealloc": false, "dump": false,
    })
}

/// Nothing here panics while it holds the lock; were something to, what it left is as good as
/// before.
fn lock(plug: &Mutex<Plug>) -> MutexGuard<'_, Plug> {
    plug.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_earlier_broker_left_is_unplugged_slot_by_slot() {
        let name = |end: &str| format!("{PREFIX}{end}");
        let devices = ["1-1s0f0", "1-1s0f1", "1-2s0f1", "1-2s0f2"].map(name);
        let objects =
            ["1-1s0f0", "1-1s0f1", "1-2s0f1", "1-2s0f2", "1-3s0f1", "x", "1-4s0fx"].map(name);
        let mut plug = Plug::left_over(&devices, &objects);
        // Of the second slot the guest has seen nothing.
        assert_eq!(plug.to_unplug(), ["1-1s0f0", "1-2s0f1", "1-2s0f2"].map(name));
        assert_eq!(plug.to_delete(), ["1-3s0f1"].map(name));
        for device in &devices {
            assert!(plug.has_devices() && plug.device_is_gone(device));
            assert!(!plug.device_is_gone(device));
        }
        assert!(!plug.has_devices() && !plug.is_empty());
        let left = plug.to_delete();
        assert_eq!(left.len(), 5);
        left.iter().for_each(|object| plug.object_is_gone(object));
        assert!(plug.is_empty() && plug.to_delete().is_empty() && plug.to_unplug().is_empty());
    }

    #[test]
    fn a_mark_goes_after_the_devices_or_is_left() {
        let device = format!("{PREFIX}1-1s0f0");
        let mark = Mark::new("1-1", "pci.0");
        assert_eq!(Mark::from_id(&mark.id), Some(mark.clone()));
        assert_eq!(Mark::from_id(&device), None);
        let devices = std::slice::from_ref(&device);
        let mut plug = Plug::left_over(devices, devices);
        plug.marks.push(mark.clone());
        assert_eq!(plug.to_delete(), [""; 0]);
        plug.device_is_gone(&device);
        assert_eq!(plug.to_delete(), [device.clone(), mark.id.clone()]);
        plug.object_is_gone(&device);
        assert!(!plug.is_empty());
        plug.object_is_gone(&mark.id);
        assert!(plug.is_empty());
        plug.marks.push(mark.clone());
        assert_eq!(plug.leave_marks(), [mark]);
        assert!(plug.is_empty());
    }
}
