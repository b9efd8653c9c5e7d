// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Entries of the table: a record for each page, an account for each open file.

/// State of a record. `P` is the page itself, an opaque handle.
pub(super) enum State<P> {
    /// A thread is mapping it; there is no page yet.
    Reserved,
    /// The page shows the target's memory.
    Mapped(P),
    /// A thread asks the host to undo the mapping, and holds the page meanwhile.
    Unmapping,
    /// The host refused to undo: the page may still be the target's, so it is never given back.
    Quarantined(P),
}

/// One replaced page of the process.
pub struct Record<P> {
    pub(super) owner: u64,
    pub(super) state: State<P>,
}

/// The account of one open file.
pub struct Owner {
    /// Most records that the file may have.
    pub(super) limit: u64,
    /// Records that belong to the file, in any state.
    pub(super) records: u64,
    /// Of these, the quarantined ones.
    pub(super) quarantined: u64,
    /// The file is closed; the account goes with its last record.
    pub(super) is_closed: bool,
}

/// Counters of one open file, in pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Records that are not quarantined: mapped, or on the way in or out.
    pub mapped: u64,
    /// Pages whose undo the host refused.
    pub quarantined: u64,
    /// Most records that the file may have.
    pub limit: u64,
}

/// The right and the duty to settle a reserved record, by `Table::commit` or `Table::abort`.
#[must_use = "the GVA stays in use until the reservation is committed or aborted"]
#[derive(Debug, PartialEq, Eq)]
pub struct Reservation {
    pub(super) gva: u64,
}

impl Reservation {
    /// The GVA that is reserved.
    pub fn gva(&self) -> u64 {
        self.gva
    }
}

/// A page taken out of its record to be undone; settled by `Table::finish` or `Table::refuse`.
#[must_use = "the record stays in state unmapping until the undo is settled"]
#[derive(Debug, PartialEq, Eq)]
pub struct Undo<P> {
    /// Where the process had the page.
    pub gva: u64,
    /// The page, which this value owns.
    pub page: P,
}

/// Why a GVA cannot be reserved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReserveError {
    /// The GVA has a record, in any state and of any file of the process (EALREADY).
    InUse,
    /// The file has as many records as it may have (ENOMEM).
    OverLimit,
    /// The file or the process is gone, or was never known (EINVAL).
    Closed,
}

/// Why a GVA cannot be unmapped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnmapError {
    /// The GVA has no record (ENOENT).
    NotMapped,
    /// Another thread is mapping or unmapping this GVA right now (EALREADY).
    Busy,
    /// The host refused; the page is quarantined, and the next unmap tries again (EIO).
    Refused,
}
