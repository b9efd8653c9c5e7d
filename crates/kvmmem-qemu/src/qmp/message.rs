// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What QEMU sends: a greeting, answers, events.

use serde::Deserialize;
use serde::de::IgnoredAny;
use serde_json::value::RawValue;

use super::error::QmpError;

/// The longest name of an event, and of its device, bytes: what is longer is not one of QEMU's, and
/// is not kept.
const MAX_NAME: usize = 256;

/// The most characters that are kept of what QEMU says of a failure.
const MAX_DESCRIPTION: usize = 200;

/// Something that happened in QEMU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QmpEvent {
    /// Its name, as `DEVICE_DELETED`.
    pub name: String,
    /// The id of the device that it is about, where it has one.
    pub device: Option<String>,
}

/// One line. Of what may be any JSON no tree is built here, where the reactor waits: the trees of
/// some lines take a hundred times their memory.
#[derive(Deserialize)]
pub(crate) struct Message {
    #[serde(rename = "QMP")]
    pub(crate) greeting: Option<IgnoredAny>,
    #[serde(rename = "return")]
    answer: Option<Box<RawValue>>,
    error: Option<Failure>,
    /// That of the command that it answers.
    id: Option<Box<RawValue>>,
    event: Option<String>,
    #[serde(default)]
    data: EventData,
}

/// What is read of an event's data; the rest is not kept.
#[derive(Default, Deserialize)]
struct EventData {
    device: Option<String>,
}

/// Why a command was refused.
#[derive(Deserialize)]
struct Failure {
    desc: String,
}

impl Message {
    /// Whether it answers a command of this process: these have no id, unlike those of another one
    /// with a copy of the connection ([`crate::pause`]).
    pub(crate) fn is_answer(&self) -> bool {
        self.id.is_none() && (self.answer.is_some() || self.error.is_some())
    }

    /// Whether it answers the command with this id.
    pub(crate) fn has_id(&self, id: &str) -> bool {
        let of = |it: &RawValue| serde_json::from_str::<&str>(it.get()).is_ok_and(|it| it == id);
        self.id.as_deref().is_some_and(of)
    }

    /// Whether it is an event, or an answer to whichever command.
    pub(crate) fn is_of_qemu(&self) -> bool {
        self.event.is_some() || self.answer.is_some() || self.error.is_some()
    }

    /// What it answers to `command`.
    pub(crate) fn into_result(self, command: &'static str) -> Result<Box<RawValue>, QmpError> {
        match self.error {
            Some(failure) => {
                let description = failure.desc.chars().take(MAX_DESCRIPTION).collect();
                Err(QmpError::Refused { command, description })
            }
            None => Ok(self.answer.unwrap_or_else(|| RawValue::NULL.to_owned())),
        }
    }

    /// The event that it is; `None` for what a later QEMU may say besides.
    pub(crate) fn into_event(self) -> Option<QmpEvent> {
        let (name, device) = (self.event?, self.data.device);
        let is_short = |text: &String| text.len() <= MAX_NAME;
        (is_short(&name) && device.as_ref().is_none_or(is_short))
            .then_some(QmpEvent { name, device })
    }
}
