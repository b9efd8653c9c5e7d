// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Receivers of what a monitor reports.

use crate::qmp::QmpEvent;

/// Receives what a monitor reports. Called by the thread that steps the monitor, or that has
/// connected: it must neither wait nor step.
pub trait Subscriber: Send + Sync {
    /// Something has happened; `counts` includes it.
    fn notify(&self, event: &MonitorEvent, counts: Counts);
}

/// What a monitor reports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MonitorEvent {
    /// An event of QEMU's.
    Qmp(QmpEvent),
    /// The connection is lost. What happens in QEMU from now on is not reported.
    Lost,
    /// There is a new connection, which has to be waited for.
    Found,
}

/// How often something has happened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// The VM was reset.
    pub resets: u64,
    /// A connection was lost.
    pub losses: u64,
}
