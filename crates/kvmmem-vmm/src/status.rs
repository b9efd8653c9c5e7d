// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Status events of the machine, one JSON object each, as `kvmmem vm --json` prints them.

use serde::Serialize;

use crate::exit::VmExit;

/// Something that a machine's owner wants to know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum VmStatus {
    /// The vCPUs are about to run for the first time.
    Started {
        /// [`crate::VmConfig::name`].
        name: String,
        /// [`crate::VmConfig::uuid`], in the usual form.
        uuid: String,
        /// Process id of the VMM.
        pid: u32,
        /// Number of vCPUs.
        vcpus: u8,
        /// Size of RAM in bytes.
        memory_bytes: u64,
        /// CID of the vsock device.
        cid: Option<u32>,
        /// How hypercalls reach the VMM: `"xen"`, `"port"`, or null for a machine that is no
        /// introspector.
        hypercalls: Option<ActiveMethod>,
        /// Whether the machine is registered with a broker.
        broker: bool,
    },
    /// The guest reset its machine, which starts anew.
    Restarted,
    /// The machine ended.
    Exited {
        /// Why.
        reason: VmExit,
    },
}

/// The hypercall method of a running introspector.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ActiveMethod {
    /// `vmcall`/`vmmcall` by Xen interception.
    Xen,
    /// The doorbell port.
    Port,
}

impl VmStatus {
    /// The event as one line of JSON, without the newline.
    pub fn to_json(&self) -> String {
        // Strings, numbers and unit variants only: nothing in here can fail to serialise.
        serde_json::to_string(self).unwrap_or_default()
    }
}

/// A UUID's bytes in the usual form, lower case.
pub(crate) fn uuid_text(uuid: &[u8; 16]) -> String {
    let mut text = String::with_capacity(36);
    for (index, byte) in uuid.iter().enumerate() {
        if matches!(index, 4 | 6 | 8 | 10) {
            text.push('-');
        }
        text.push_str(&format!("{byte:02x}"));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_one_json_object_each() {
        let started = VmStatus::Started {
            name: "a\nb".into(),
            uuid: uuid_text(&[0x0f; 16]),
            pid: 7,
            vcpus: 2,
            memory_bytes: 4096,
            cid: None,
            hypercalls: Some(ActiveMethod::Port),
            broker: false,
        };
        assert_eq!(
            started.to_json(),
            r#"{"event":"started","name":"a\nb","uuid":"0f0f0f0f-0f0f-0f0f-0f0f-0f0f0f0f0f0f","pid":7,"vcpus":2,"memory_bytes":4096,"cid":null,"hypercalls":"port","broker":false}"#
        );
        let exited = VmStatus::Exited { reason: VmExit::TripleFault };
        assert_eq!(exited.to_json(), r#"{"event":"exited","reason":"triple_fault"}"#);
    }
}
