// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Transitions of a process's mapping table.
//!
//! Each takes `&mut self`, so the caller holds the table's lock. A transition never sleeps or
//! allocates, and never fails half-way.

use super::map::{Map, Maps};
use super::record::{Owner, Record, Reservation, ReserveError, State, Undo, UnmapError, Usage};

/// The replaced pages of one process, by GVA, and the accounts of its open files, by a number that
/// is never reused.
pub struct Table<P, M: Maps> {
    records: M::Map<Record<P>>,
    owners: M::Map<Owner>,
    is_dead: bool,
}

/// Memory for one record of a [`Table`].
pub type RecordSlot<P, M> = <<M as Maps>::Map<Record<P>> as Map<Record<P>>>::Slot;

/// Memory for one owner of a [`Table`].
pub type OwnerSlot<M> = <<M as Maps>::Map<Owner> as Map<Owner>>::Slot;

impl<P, M: Maps> Default for Table<P, M> {
    fn default() -> Self {
        Self { records: Default::default(), owners: Default::default(), is_dead: false }
    }
}

impl<P, M: Maps> Table<P, M> {
    /// Opens the account of a new file that may have `limit` records. The number was never used
    /// before.
    pub fn open(&mut self, slot: OwnerSlot<M>, owner: u64, limit: u64) {
        self.owners.insert(
            slot,
            owner,
            Owner { limit, records: 0, quarantined: 0, is_closed: false },
        );
    }

    /// Takes `gva` for `owner`. Until [`Table::commit`] or [`Table::abort`] no other
    /// operation can change the record: it holds no page.
    pub fn reserve(
        &mut self,
        slot: RecordSlot<P, M>,
        gva: u64,
        owner: u64,
    ) -> Result<Reservation, ReserveError> {
        let account =
            self.owners.get_mut(owner).filter(|account| !account.is_closed && !self.is_dead);
        let account = account.ok_or(ReserveError::Closed)?;
        if self.records.get(gva).is_some() {
            return Err(ReserveError::InUse);
        }
        if account.records >= account.limit {
            return Err(ReserveError::OverLimit);
        }
        account.records += 1;
        self.records.insert(slot, gva, Record { owner, state: State::Reserved });
        Ok(Reservation { gva })
    }

    /// Publishes the page of a reserved record. Where the file or the process went away meanwhile
    /// the page comes straight back, to be undone.
    pub fn commit(&mut self, reservation: Reservation, page: P) -> Option<Undo<P>> {
        let Reservation { gva } = reservation;
        let Some(record) = self.records.get_mut(gva) else {
            return Some(Undo { gva, page });
        };
        let is_gone =
            self.is_dead || self.owners.get(record.owner).is_none_or(|account| account.is_closed);
        if is_gone {
            record.state = State::Unmapping;
            return Some(Undo { gva, page });
        }
        record.state = State::Mapped(page);
        None
    }

    /// Gives a reserved GVA back.
    pub fn abort(&mut self, reservation: Reservation) {
        self.remove(reservation.gva);
    }

    /// Takes the page at `gva` out, whichever file of the process mapped it, to be undone. A
    /// quarantined page is handed out as well: that is how its undo is tried again.
    pub fn begin_undo(&mut self, gva: u64) -> Result<Undo<P>, UnmapError> {
        let record = self.records.get_mut(gva).ok_or(UnmapError::NotMapped)?;
        match core::mem::replace(&mut record.state, State::Unmapping) {
            State::Mapped(page) => Ok(Undo { gva, page }),
            State::Quarantined(page) => {
                if let Some(account) = self.owners.get_mut(record.owner) {
                    account.quarantined = account.quarantined.saturating_sub(1);
                }
                Ok(Undo { gva, page })
            }
            other => {
                record.state = other;
                Err(UnmapError::Busy)
            }
        }
    }

    /// Takes the next page at or above `from` out to be undone: of `owner`, or of the whole
    /// process. Records that another thread is mapping or unmapping are passed over; that
    /// thread settles them.
    pub fn next_undo(&mut self, owner: Option<u64>, from: u64) -> Option<Undo<P>> {
        let mut from = from;
        loop {
            let (gva, record) = self.records.first_from(from)?;
            let is_ours = owner.is_none_or(|owner| owner == record.owner);
            if is_ours && matches!(record.state, State::Mapped(_) | State::Quarantined(_)) {
                return self.begin_undo(gva).ok();
            }
            from = gva.checked_add(1)?;
        }
    }

    /// The host undid the mapping at `gva`: its record goes.
    pub fn finish(&mut self, gva: u64) {
        self.remove(gva);
    }

    /// The host refused to undo: the page goes back into its record, for good or until the next
    /// attempt.
    pub fn refuse(&mut self, undo: Undo<P>) {
        let Some(record) = self.records.get_mut(undo.gva) else {
            return;
        };
        record.state = State::Quarantined(undo.page);
        if let Some(account) = self.owners.get_mut(record.owner) {
            account.quarantined += 1;
        }
    }

    /// The file is closed: it gets no further records, and its account goes with the last one.
    pub fn close(&mut self, owner: u64) {
        if let Some(account) = self.owners.get_mut(owner) {
            account.is_closed = true;
        }
        self.settle(owner);
    }

    /// The process is gone: no file gets further records.
    pub fn die(&mut self) {
        self.is_dead = true;
    }

    /// The counters of a file, `None` once it is closed and has no record left.
    pub fn usage(&self, owner: u64) -> Option<Usage> {
        let account = self.owners.get(owner)?;
        Some(Usage {
            mapped: account.records.saturating_sub(account.quarantined),
            quarantined: account.quarantined,
            limit: account.limit,
        })
    }

    fn remove(&mut self, gva: u64) {
        let Some(record) = self.records.remove(gva) else {
            return;
        };
        if let Some(account) = self.owners.get_mut(record.owner) {
            account.records = account.records.saturating_sub(1);
        }
        self.settle(record.owner);
    }

    fn settle(&mut self, owner: u64) {
        if self.owners.get(owner).is_some_and(|account| account.is_closed && account.records == 0) {
            self.owners.remove(owner);
        }
    }
}
