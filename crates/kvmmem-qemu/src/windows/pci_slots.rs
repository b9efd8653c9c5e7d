// SPDX-License-Identifier: Apache-2.0 OR MIT
//! PCI slots of a QEMU that views can be plugged into.

use std::collections::BTreeSet;
use std::fmt;

use serde::Deserialize;
use serde_json::Value;

/// Root ports for views have ids that begin like this; libvirt puts `ua-` before the ids that its
/// users choose.
const PORTS: [&str; 2] = ["kvmmem", "ua-kvmmem"];

/// The bus of a machine whose root bus takes devices while it runs.
const ROOT_BUS: &str = "pci.0";

/// Slots of a bus.
const SLOTS: u32 = 32;

/// The most buses that are looked through, one beneath the other.
const MAX_DEPTH: u32 = 8;

/// i440FX's host bridge, as `query-pci` shows it.
const I440FX: Id = Id { vendor: 0x8086, device: 0x1237 };

/// A slot: a bus by its QEMU id, and its number there.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PciSlot {
    /// The bus's id.
    pub bus: String,
    /// The slot's number there.
    pub slot: u32,
}

impl fmt::Display for PciSlot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} slot {}", self.bus, self.slot)
    }
}

/// The slots that there are for views.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PciSlots {
    /// Those that nothing is in.
    pub free: BTreeSet<PciSlot>,
    /// How many there are.
    pub count: usize,
}

#[derive(Deserialize)]
struct Bus {
    #[serde(default)]
    devices: Vec<Device>,
}

#[derive(Deserialize)]
struct Device {
    #[serde(default)]
    slot: u32,
    #[serde(default)]
    qdev_id: String,
    id: Id,
    pci_bridge: Option<Bridge>,
}

#[derive(Clone, Copy, Deserialize, PartialEq, Eq)]
struct Id {
    vendor: u64,
    device: u64,
}

#[derive(Deserialize)]
struct Bridge {
    #[serde(default)]
    devices: Vec<Device>,
}

/// The slots for views, from the answer to `query-pci`; `None` where that is no such answer. Where
/// there are root ports whose ids say that they are for views, those and no others; else, on an
/// i440FX, all of its bus.
pub(super) fn find(answer: Value) -> Option<PciSlots> {
    let buses: Vec<Bus> = serde_json::from_value(answer).ok()?;
    let mut ports = PciSlots::default();
    for bus in &buses {
        add_ports(&bus.devices, 0, &mut ports);
    }
    if ports.count > 0 {
        return Some(ports);
    }
    let root = buses.first()?;
    if !root.devices.iter().any(|device| device.slot == 0 && device.id == I440FX) {
        return Some(ports);
    }
    let used: BTreeSet<u32> = root.devices.iter().map(|device| device.slot).collect();
    let place = |slot| PciSlot { bus: ROOT_BUS.to_owned(), slot };
    let free: BTreeSet<PciSlot> =
        (1..SLOTS).filter(|slot| !used.contains(slot)).map(place).collect();
    Some(PciSlots { count: free.len(), free })
}

fn add_ports(devices: &[Device], depth: u32, ports: &mut PciSlots) {
    for device in devices {
        let Some(bridge) = &device.pci_bridge else { continue };
        if PORTS.iter().any(|name| device.qdev_id.starts_with(name)) {
            ports.count += 1;
            if bridge.devices.is_empty() {
                ports.free.insert(PciSlot { bus: device.qdev_id.clone(), slot: 0 });
            }
        } else if depth < MAX_DEPTH {
            add_ports(&bridge.devices, depth + 1, ports);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn device(slot: u32, id: &str) -> Value {
        json!({ "bus": 0, "slot": slot, "function": 0, "qdev_id": id, "class_info": { "class": 2 },
                "id": { "device": 4369, "vendor": 4660 }, "regions": [] })
    }

    fn port(slot: u32, id: &str, devices: &[Value]) -> Value {
        let mut port = device(slot, id);
        port["pci_bridge"] =
            json!({ "bus": { "number": 0, "secondary": 1, "subordinate": 1 }, "devices": devices });
        port
    }

    fn machine(bridge: u64, devices: &[Value]) -> Value {
        let host = json!({ "slot": 0, "function": 0, "qdev_id": "", "id": { "device": bridge, "vendor": 0x8086 } });
        let devices: Vec<&Value> = std::iter::once(&host).chain(devices).collect();
        json!([{ "bus": 0, "devices": devices }])
    }

    fn free(slots: &PciSlots) -> Vec<String> {
        slots.free.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn root_ports_for_views_are_free_while_nothing_is_in_them() {
        let nested = port(9, "upstream", &[port(0, "kvmmem2", &[])]);
        let slots = find(machine(
            0x29c0,
            &[
                port(1, "rp1", &[]),
                port(2, "kvmmem0", &[device(0, "nic")]),
                port(3, "kvmmem1", &[]),
                port(4, "ua-kvmmem9", &[]),
                port(5, "xkvmmem", &[]),
                device(6, "kvmmem-view-1"),
                nested,
            ],
        ))
        .unwrap();
        assert_eq!(
            (free(&slots), slots.count),
            (
                ["kvmmem1 slot 0", "kvmmem2 slot 0", "ua-kvmmem9 slot 0"]
                    .map(String::from)
                    .to_vec(),
                4
            )
        );
        assert_eq!(find(machine(0x29c0, &[port(1, "rp1", &[])])), Some(PciSlots::default()));
    }

    #[test]
    fn an_i440fx_takes_devices_in_any_free_slot() {
        let used: Vec<Value> = (1..30).map(|slot| device(slot, "")).collect();
        let slots = find(machine(0x1237, &used)).unwrap();
        assert_eq!(
            (free(&slots), slots.count),
            (["pci.0 slot 30", "pci.0 slot 31"].map(String::from).to_vec(), 2)
        );
        // Ports that are meant for views are preferred.
        let slots = find(machine(0x1237, &[port(3, "kvmmem0", &[])])).unwrap();
        assert_eq!(free(&slots), ["kvmmem0 slot 0"]);
    }

    #[test]
    fn what_is_no_list_of_buses_is_none() {
        for answer in [
            json!({}),
            json!([]),
            json!([{ "devices": [{}] }]),
            json!(null),
            json!([7]),
            json!("x"),
        ] {
            assert_eq!(find(answer.clone()), None, "{answer}");
        }
        let mut deep = port(1, "a", &[]);
        for _ in 0..20 {
            deep = port(1, "a", &[deep]);
        }
        assert_eq!(find(machine(0x29c0, &[deep])), Some(PciSlots::default()));
    }

    proptest! {
        #[test]
        fn no_slot_is_free_that_something_is_in(slots in proptest::collection::btree_set(1u32..32, 0..31)) {
            let used: Vec<Value> = slots.iter().map(|slot| device(*slot, "")).collect();
            let found = find(machine(0x1237, &used)).unwrap();
            prop_assert_eq!(found.count + slots.len(), 31);
            prop_assert!(found.free.iter().all(|free| !slots.contains(&free.slot)));
        }
    }
}
