// SPDX-License-Identifier: Apache-2.0 OR MIT
//! PCI slots of a QEMU that views can be plugged into.

use std::collections::BTreeSet;
use std::fmt;

use serde::Deserialize;
use serde_json::Value;

/// Root ports for views have ids that begin like this; libvirt puts `ua-` before the ids that its users choose.
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
pub(super) struct Place {
    pub(super) bus: String,
    pub(super) slot: u32,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} slot {}", self.bus, self.slot)
    }
}

/// The slots that there are for views.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Places {
    /// Those that nothing is in.
    pub(super) free: BTreeSet<Place>,
    /// How many there are.
    pub(super) count: usize,
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

/// The slots for views, from the answer to `query-pci`; `None` where that is no such answer. Where there are root ports
/// whose ids say that they are for views, those and no others; else, on an i440FX, all of its bus.
pub(super) fn find(answer: Value) -> Option<Places> {
    let buses: Vec<Bus> = serde_json::from_value(answer).ok()?;
    let mut ports = Places::default();
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
    let place = |slot| Place { bus: ROOT_BUS.to_owned(), slot };
    let free: BTreeSet<Place> = (1..SLOTS).filter(|slot| !used.contains(slot)).map(place).collect();
    Some(Places { count: free.len(), free })
}

fn add_ports(devices: &[Device], depth: u32, ports: &mut Places) {
    for device in devices {
        let Some(bridge) = &device.pci_bridge else { continue };
        if PORTS.iter().any(|name| device.qdev_id.starts_with(name)) {
            ports.count += 1;
            if bridge.devices.is_empty() {
                ports.free.insert(Place { bus: device.qdev_id.clone(), slot: 0 });
            }
        } else if depth < MAX_DEPTH {
            add_ports(&bridge.devices, depth + 1, ports);
        }
    }
}
