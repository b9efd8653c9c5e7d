// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is asked of an introspector's QEMU.

use kvmmem_proto::name;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use uuid::Uuid;

use super::Introspector;
use super::monitor::{Monitor, MonitorError};
use super::pci_slots::{self, PciSlots};
use super::plug::{PREFIX, Plug};

/// Where devices are in QEMU's tree of objects: those with an id, and the others.
const DEVICES: [&str; 2] = ["/machine/peripheral", "/machine/peripheral-anon"];

/// Where memory backends are.
const OBJECTS: &str = "/objects";

/// The devices that give a VM its vsock context id.
const VSOCK: &str = "child<vhost-vsock";

/// The most devices that are asked for one.
const MAX_VSOCK: usize = 4;

/// What a QEMU can do, and who its VM is.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    pub(super) name: Option<String>,
    pub(super) uuid: Option<Uuid>,
    pub(super) vcpus: u32,
    pub(super) cid: Option<u32>,
    pub(super) has_offset: bool,
}

/// Why a QEMU cannot have views, as far as is known.
#[derive(Debug, thiserror::Error)]
pub enum AskError {
    /// It was asked and did not say.
    #[error("QEMU does not say what is needed")]
    Monitor(#[from] MonitorError),
    /// It said something else.
    #[error("QEMU's answer to {0} makes no sense")]
    Answer(&'static str),
    /// It was built without the device.
    #[error(
        "this QEMU has no ivshmem-plain, by which views are shown; Debian's and upstream's have it"
    )]
    NoDevice,
    /// It is too old.
    #[error("this QEMU is older than 6.0: it shows no memory read-only")]
    TooOld,
}

/// A member of an object, or a property, as QEMU lists it.
#[derive(Deserialize)]
struct Item {
    name: String,
    #[serde(rename = "type", default)]
    kind: String,
}

impl Machine {
    /// Asks a QEMU.
    pub(super) fn of(monitor: &Monitor) -> Result<Self, AskError> {
        let arguments = json!({ "typename": "ivshmem-plain" });
        match monitor.execute("device-list-properties", arguments) {
            Err(error) if error.is_refusal() => return Err(AskError::NoDevice),
            answer => answer?,
        };
        let arguments = json!({ "typename": "memory-backend-file" });
        let properties: Vec<Item> = ask(monitor, "qom-list-properties", arguments)?;
        let has = |name: &str| properties.iter().any(|property| property.name == name);
        if !has("readonly") {
            return Err(AskError::TooOld);
        }
        let name: Value = ask(monitor, "query-name", json!({}))?;
        let uuid: Value = ask(monitor, "query-uuid", json!({}))?;
        let uuid =
            uuid.get("UUID").and_then(Value::as_str).and_then(|uuid| Uuid::parse_str(uuid).ok());
        let vcpus: Vec<Value> = ask(monitor, "query-cpus-fast", json!({}))?;
        Ok(Self {
            name: name.get("name").and_then(Value::as_str).and_then(name::fit),
            uuid: uuid.filter(|uuid| !uuid.is_nil()),
            vcpus: u32::try_from(vcpus.len()).map_err(|_| AskError::Answer("query-cpus-fast"))?,
            cid: cid(monitor)?,
            has_offset: has("offset"),
        })
    }
}

/// The slots for views.
pub(super) fn places(monitor: &Monitor) -> Result<PciSlots, AskError> {
    let answer = monitor.execute("query-pci", json!({}))?;
    pci_slots::find(answer).ok_or(AskError::Answer("query-pci"))
}

impl Introspector {
    pub(super) fn places(&self) -> Result<PciSlots, AskError> {
        places(&self.monitor)
    }
}

/// What an earlier broker has left of its views; `None` where nothing is left.
pub(super) fn left_over(monitor: &Monitor) -> Result<Option<Plug>, AskError> {
    let [devices, _] = DEVICES;
    let ids = |path: &str, kind: &str| -> Result<Vec<String>, AskError> {
        let is_ours = |item: &Item| item.name.starts_with(PREFIX) && item.kind == kind;
        Ok(list(monitor, path)?.into_iter().filter(is_ours).map(|item| item.name).collect())
    };
    let devices = ids(devices, "child<ivshmem-plain>")?;
    let objects = ids(OBJECTS, "child<memory-backend-file>")?;
    if devices.is_empty() && objects.is_empty() {
        return Ok(None);
    }
    for device in &devices {
        monitor.watch(device);
    }
    Ok(Some(Plug::left_over(&devices, &objects)))
}

/// The VM's vsock context id.
fn cid(monitor: &Monitor) -> Result<Option<u32>, AskError> {
    for directory in DEVICES {
        let devices = list(monitor, directory)?;
        for device in devices.iter().filter(|device| device.kind.starts_with(VSOCK)).take(MAX_VSOCK)
        {
            let path = format!("{directory}/{}", device.name);
            let arguments = json!({ "path": path, "property": "guest-cid" });
            match monitor.execute("qom-get", arguments) {
                Ok(value) => return Ok(value.as_u64().and_then(|cid| u32::try_from(cid).ok())),
                Err(error) if error.is_refusal() => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(None)
}

/// The members of an object.
fn list(monitor: &Monitor, path: &str) -> Result<Vec<Item>, AskError> {
    ask(monitor, "qom-list", json!({ "path": path }))
}

fn ask<T: DeserializeOwned>(
    monitor: &Monitor,
    command: &'static str,
    arguments: Value,
) -> Result<T, AskError> {
    let answer = monitor.execute(command, arguments)?;
    serde_json::from_value(answer).map_err(|_| AskError::Answer(command))
}
