// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a virtual machine ended.

use serde::Serialize;

/// Why [`crate::run`] returned without an error.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum VmExit {
    /// The guest powered its machine off.
    PowerOff,
    /// The guest reset its machine, and the configuration says to end then.
    Reset,
    /// The guest's CPU shut down (triple fault). Not treated as a reset: a kernel that cannot boot
    /// would loop forever.
    TripleFault,
    /// Stopped from outside: [`crate::StopHandle::stop`], SIGINT, SIGTERM, or Ctrl-A x on the
    /// serial terminal.
    Stopped,
}
