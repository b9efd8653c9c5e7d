// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a view may do, whether it can be used, and what has happened to it.

use kvmmem_memory::Range;

/// Rights that a tool asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read only, even if the grant allows writes.
    ReadOnly,
    /// Everything that the grant allows.
    Granted,
}

/// Whether a view can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It can be used.
    Open,
    /// It has ended: the grant was revoked.
    Revoked,
    /// It has ended: the target or the broker has exited.
    Gone,
}

/// What has happened to a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The target was reset or its memory map has changed: see
    /// [`View::status`](super::View::status).
    Changed,
    /// The grant was revoked; the view has ended.
    Revoked,
    /// The target or the broker has exited; the view has ended.
    Gone,
}

/// A view's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Grows with each change of the view.
    pub generation: u64,
    /// Whether it can be used.
    pub state: State,
    /// Whether the target's memory may be written.
    pub is_writable: bool,
    /// The target's UUID, in the order in which it is printed.
    pub uuid: [u8; 16],
    /// The memory that can be reached: disjoint, in pages, ascending.
    pub ranges: Vec<Range>,
}
