// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Programs that the end-to-end scenarios run inside the guests, and their output: one JSON object
//! a line.
#![deny(unsafe_code)]

use serde::{Deserialize, Serialize};

/// Offset in bytes of the marker, 32 random bytes, in the target's page.
pub const MARKER: usize = 0;
/// Length in bytes of the marker.
pub const MARKER_LEN: usize = 32;
/// Offset of the word that the target counts up all the time.
pub const COUNTER: usize = 32;
/// Offset of the word that the target watches.
pub const INBOX: usize = 40;

/// Output of the program in the target.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TargetReport {
    /// The marker and the counter are in place.
    Marker {
        /// Guest-physical addresses of the pages; the first holds the counter and the inbox too,
        /// and each page begins with the marker, its first word changed by exclusive or
        /// with the page's index.
        gpas: Vec<u64>,
        /// The 32 bytes in hex.
        marker: String,
    },
    /// A tool wrote this into the inbox.
    Inbox {
        /// The word.
        value: u64,
    },
}

/// One step of a tool: what it did, whether that worked, how long it took.
#[derive(Debug, Serialize, Deserialize)]
pub struct Step {
    /// What was done.
    pub what: String,
    /// Whether the outcome was the right one.
    pub ok: bool,
    /// What was seen.
    pub detail: String,
    /// How long it took.
    pub nanos: u64,
}

/// A tool asks the scenario for tokens by standard input.
#[derive(Debug, Serialize, Deserialize)]
pub struct More {
    /// How many.
    pub more: usize,
}

/// A tool has come to the point at which the scenario is to act.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ready {
    /// The tool's process id.
    pub ready: u32,
}

/// A series of times that a tool took.
#[derive(Debug, Serialize, Deserialize)]
pub struct Samples {
    /// What was timed.
    pub name: String,
    /// Each time in nanoseconds.
    pub nanos: Vec<u64>,
}

/// Bytes as lower-case hex.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The bytes that a page with this index begins with.
#[must_use]
pub fn page_marker(marker: &[u8; MARKER_LEN], index: usize) -> [u8; MARKER_LEN] {
    let mut bytes = *marker;
    for (byte, change) in bytes.iter_mut().zip((index as u64).to_le_bytes()) {
        *byte ^= change;
    }
    bytes
}
