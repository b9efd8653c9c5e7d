// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is asked of a QEMU that is to show windows to its guest.

use kvmmem_proto::name;
use serde::Deserialize;
use serde_json::{Value, json};
use uuid::Uuid;

use super::pci_slots::{self, PciSlots};
use super::plug::{MARK_TYPE, Mark, PREFIX, Plug};
use crate::qmp::{Qmp, QmpError};

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
pub struct Machine {
    /// The VM's name, where it has one.
    pub name: Option<String>,
    /// Its UUID, where it has one.
    pub uuid: Option<Uuid>,
    /// How many vCPUs it has.
    pub vcpus: u32,
    /// Its vsock context id, where it has one.
    pub cid: Option<u32>,
    /// Whether this QEMU shows parts of files.
    pub has_offset: bool,
}

/// Why a QEMU cannot show windows, as far as is known.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// It was asked and did not say.
    #[error("QEMU does not say what is needed")]
    Qmp(#[from] QmpError),
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
    pub fn of(qmp: &mut Qmp) -> Result<Self, MachineError> {
        let arguments = json!({ "typename": "ivshmem-plain" });
        match qmp.execute("device-list-properties", arguments) {
            Err(error) if error.is_refusal() => return Err(MachineError::NoDevice),
            answer => answer?,
        };
        let arguments = json!({ "typename": "memory-backend-file" });
        let properties: Vec<Item> = qmp.ask("qom-list-properties", arguments)?;
        let has = |name: &str| properties.iter().any(|property| property.name == name);
        if !has("readonly") {
            return Err(MachineError::TooOld);
        }
        let name: Value = qmp.ask("query-name", json!({}))?;
        let uuid: Value = qmp.ask("query-uuid", json!({}))?;
        let uuid =
            uuid.get("UUID").and_then(Value::as_str).and_then(|uuid| Uuid::parse_str(uuid).ok());
        Ok(Self {
            name: name.get("name").and_then(Value::as_str).and_then(name::fit),
            uuid: uuid.filter(|uuid| !uuid.is_nil()),
            vcpus: qmp.vcpus()?,
            cid: cid(qmp)?,
            has_offset: has("offset"),
        })
    }
}

/// The slots for views.
pub fn slots(qmp: &mut Qmp) -> Result<PciSlots, MachineError> {
    let answer = qmp.execute("query-pci", json!({}))?;
    pci_slots::find(answer).ok_or(MachineError::Answer("query-pci"))
}

/// What an earlier broker has left of its views; `None` where nothing is left.
pub fn left_over(qmp: &mut Qmp) -> Result<Option<Plug>, MachineError> {
    let mut ids = |path: &str, kind: &str| -> Result<Vec<String>, MachineError> {
        let is_ours = |item: &Item| item.name.starts_with(PREFIX) && item.kind == kind;
        Ok(list(qmp, path)?.into_iter().filter(is_ours).map(|item| item.name).collect())
    };
    let [devices, _] = DEVICES;
    let devices = ids(devices, "child<ivshmem-plain>")?;
    let objects = ids(OBJECTS, "child<memory-backend-file>")?;
    let is_none = devices.is_empty() && objects.is_empty();
    Ok((!is_none).then(|| Plug::left_over(&devices, &objects)))
}

/// The marks of buses that must not be used before the VM is reset.
///
/// # Errors
/// [`MachineError`].
pub fn marks(qmp: &mut Qmp) -> Result<Vec<Mark>, MachineError> {
    let kind = format!("child<{MARK_TYPE}>");
    let objects = list(qmp, OBJECTS)?.into_iter().filter(|item| item.kind == kind);
    Ok(objects.filter_map(|item| Mark::from_id(&item.name)).collect())
}

/// The VM's vsock context id.
fn cid(qmp: &mut Qmp) -> Result<Option<u32>, MachineError> {
    for directory in DEVICES {
        let devices = list(qmp, directory)?;
        for device in devices.iter().filter(|device| device.kind.starts_with(VSOCK)).take(MAX_VSOCK)
        {
            let path = format!("{directory}/{}", device.name);
            let arguments = json!({ "path": path, "property": "guest-cid" });
            match qmp.execute("qom-get", arguments) {
                Ok(value) => return Ok(value.as_u64().and_then(|cid| u32::try_from(cid).ok())),
                Err(error) if error.is_refusal() => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
    Ok(None)
}

/// The members of an object.
fn list(qmp: &mut Qmp, path: &str) -> Result<Vec<Item>, MachineError> {
    Ok(qmp.ask("qom-list", json!({ "path": path }))?)
}
