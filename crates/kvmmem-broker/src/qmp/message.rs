// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What QEMU sends: a greeting, answers, events.

use serde::Deserialize;
use serde_json::Value;

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq)]
pub struct QmpEvent {
    /// Its name, as `DEVICE_DELETED`.
    pub name: String,
    /// What belongs to it; null where nothing does.
    pub data: Value,
}

/// One line.
#[derive(Deserialize)]
pub(super) struct Message {
    #[serde(rename = "QMP")]
    pub(super) greeting: Option<Value>,
    #[serde(rename = "return")]
    pub(super) answer: Option<Value>,
    pub(super) error: Option<Failure>,
    event: Option<String>,
    #[serde(default)]
    data: Value,
}

/// Why a command was refused.
#[derive(Deserialize)]
pub(super) struct Failure {
    pub(super) desc: String,
}

impl Message {
    pub(super) fn is_answer(&self) -> bool {
        self.answer.is_some() || self.error.is_some()
    }

    /// The event that it is; `None` for what a later QEMU may say besides.
    pub(super) fn into_event(self) -> Option<QmpEvent> {
        Some(QmpEvent { name: self.event?, data: self.data })
    }
}
