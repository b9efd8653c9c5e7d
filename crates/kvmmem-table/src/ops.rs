// SPDX-License-Identifier: Apache-2.0 OR MIT
//! MAP, UNMAP, closing a file and the end of the process, as sequences of transitions.
//!
//! The table's lock is held for each transition, and never while a page is pinned or the host is
//! asked, which sleep.

use super::map::Maps;
use super::record::{ReserveError, Undo, UnmapError};
use super::table::{RecordSlot, Table};

/// A page that shows a target's memory. Dropping one leaks the memory behind it on purpose, since
/// only the host's consent makes it safe to use again.
pub trait Page: Sized {
    /// Asks the host to undo the mapping, then gives the page back to where it came from. A refusal
    /// returns the page.
    fn undo(self) -> Result<(), Self>;
}

/// A table that several threads share.
pub trait Shared {
    /// The pages in the table.
    type Page: Page;
    /// The maps that the table is made of.
    type Maps: Maps;

    /// Runs `transition` with the table's lock held.
    fn with<R>(&self, transition: impl FnOnce(&mut Table<Self::Page, Self::Maps>) -> R) -> R;
}

/// MAP: `make` pins the page and has the host replace it; its error is the result, and the GVA is
/// free again.
pub fn map<S: Shared, E: From<ReserveError>>(
    shared: &S,
    slot: RecordSlot<S::Page, S::Maps>,
    gva: u64,
    owner: u64,
    make: impl FnOnce() -> Result<S::Page, E>,
) -> Result<(), E> {
    let reservation = shared.with(|table| table.reserve(slot, gva, owner))?;
    match make() {
        Ok(page) => match shared.with(|table| table.commit(reservation, page)) {
            None => Ok(()),
            Some(undo) => {
                settle(shared, undo);
                Err(ReserveError::Closed.into())
            }
        },
        Err(error) => {
            shared.with(|table| table.abort(reservation));
            Err(error)
        }
    }
}

/// UNMAP: undoes the mapping at `gva`, whichever file of the process made it.
pub fn unmap<S: Shared>(shared: &S, gva: u64) -> Result<(), UnmapError> {
    let undo = shared.with(|table| table.begin_undo(gva))?;
    if settle(shared, undo) { Ok(()) } else { Err(UnmapError::Refused) }
}

/// Closing a file: undoes its own mappings, one by one. What the host refuses stays
/// quarantined in the table.
pub fn close<S: Shared>(shared: &S, owner: u64) {
    shared.with(|table| table.close(owner));
    undo_each(shared, Some(owner));
}

/// The death of the process: undoes every mapping, of all of its files.
pub fn die<S: Shared>(shared: &S) {
    shared.with(|table| table.die());
    undo_each(shared, None);
}

fn undo_each<S: Shared>(shared: &S, owner: Option<u64>) {
    let mut from = 0;
    // Going up only, so that a refused page is tried once and the loop ends.
    while let Some(undo) = shared.with(|table| table.next_undo(owner, from)) {
        let gva = undo.gva;
        settle(shared, undo);
        match gva.checked_add(1) {
            Some(next) => from = next,
            None => break,
        }
    }
}

/// Asks the host, without the lock, and records its answer. Returns whether the host agreed.
fn settle<S: Shared>(shared: &S, undo: Undo<S::Page>) -> bool {
    let Undo { gva, page } = undo;
    match page.undo() {
        Ok(()) => {
            shared.with(|table| table.finish(gva));
            true
        }
        Err(page) => {
            shared.with(|table| table.refuse(Undo { gva, page }));
            false
        }
    }
}
