// SPDX-License-Identifier: GPL-2.0-only
//! All plugged slots by their place on the PCI bus, and the slot that a token claims.

use core::cell::Cell;
use core::ops::Deref;

use kernel::prelude::*;
use kernel::sync::Arc;

use crate::abi::descriptor::{DescriptorError, COMPLAINT_INVALID, SLOT_WINDOWS};
use crate::abi::token_list::{self, Digest};
use crate::slot::{Head, Slot, Window};
use crate::snapshot::{CheckError, PageCopy, Snapshot};
use crate::sys::lock::StaticMutex;
use crate::sys::work;
use crate::window::Extent;

/// All slots with at least one bound function.
type Slots = KVec<Arc<Slot>>;

static SLOTS: StaticMutex<Slots> =
    StaticMutex::new(c"kvmmem_slots", || kernel::static_lock_class!());

/// Binds function 0 of the slot at `place`.
pub(crate) fn add_head(place: u32, head: Head) -> Result<Arc<Slot>> {
    let mut slots = SLOTS.lock();
    let slot = match find(&slots, place) {
        Some(slot) => slot,
        None => {
            let slot = Slot::new(place)?;
            slots.push(slot.clone(), GFP_KERNEL)?;
            slot
        }
    };
    slot.set_head(head);
    look_again(&slots, &slot);
    Ok(slot)
}

/// Binds a further function of the slot at `place`: `None` where function 0 is not bound.
pub(crate) fn add_window(place: u32, number: u32, window: Window) -> Option<Arc<Slot>> {
    let slots = SLOTS.lock();
    let slot = find(&slots, place).filter(|slot| slot.has_head())?;
    slot.set_window(number, Some(window));
    look_again(&slots, &slot);
    Some(slot)
}

/// Whether function 0 of the slot at `place` is bound.
pub(crate) fn has_head(place: u32) -> bool {
    find(&SLOTS.lock(), place).is_some_and(|slot| slot.has_head())
}

/// Whether any function is bound.
pub(crate) fn is_any_bound() -> bool {
    !SLOTS.lock().is_empty()
}

/// Removes a function; a view that shows the slot ends.
pub(crate) fn remove(slot: &Arc<Slot>, function: u32) {
    let mut slots = SLOTS.lock();
    let digest = slot.digest();
    match function {
        0 => slot.take_head(),
        number => slot.set_window(number, None),
    }
    slot.lose();
    for other in slots
        .iter()
        .filter(|other| digest.is_some() && other.digest() == digest)
    {
        other.lose();
    }
    if slot.is_empty() {
        slots.retain(|other| !Arc::ptr_eq(other, slot));
    }
    if slots.is_empty() {
        // Statics are not dropped when the module goes.
        *slots = KVec::new();
    }
    drop(slots);
    if function == 0 {
        // Outside the lock: the work takes it.
        work::cancel(slot);
    }
}

fn find(slots: &Slots, place: u32) -> Option<Arc<Slot>> {
    slots.iter().find(|slot| slot.place() == place).cloned()
}

/// A view may become complete by a function of any of its slots.
fn look_again(slots: &Slots, slot: &Slot) {
    let Some(digest) = slot.digest() else { return };
    if let Some(first) = slots.iter().find(|other| other.is_part(&digest, 0)) {
        first.look_soon();
    }
}

/// Window `number` of the view whose slots carry `digest`.
fn window(slots: &Slots, digest: &[u8; 32], number: u32) -> Option<Window> {
    let index = number.checked_sub(1)?;
    let slot = slots
        .iter()
        .find(|slot| slot.is_part(digest, index / SLOT_WINDOWS))?;
    slot.window(1 + index % SLOT_WINDOWS)
}

/// Looks whether a view's first slot, and with it the view, is complete, and tells the host. Called
/// by the slot's work.
pub(crate) fn check(slot: &Slot) {
    let slots = SLOTS.lock();
    // Otherwise it is tried again.
    let Some((digest, Ok(copy))) = slot.copy() else {
        return;
    };
    match look(&slots, &digest, &copy) {
        Ok(snapshot) => slot.report(snapshot.descriptor.generation),
        Err(Some(complaint)) => slot.complain(complaint),
        Err(None) => {}
    }
}

/// The descriptor, if all of its windows are there. `Err(None)` where something is still missing or
/// the host is changing the page, else what there is to complain of.
fn look(slots: &Slots, digest: &[u8; 32], copy: &PageCopy) -> Result<Snapshot, Option<u32>> {
    let missing = Cell::new(false);
    let complaint = Cell::new(None);
    let checked = Snapshot::check_plugged(copy, |number| match window(slots, digest, number) {
        Some(Ok(bar)) => Some(bar.len),
        Some(Err(why)) => {
            complaint.set(Some(why));
            None
        }
        None => {
            missing.set(number > 0);
            None
        }
    });
    checked.map_err(|error| match error {
        CheckError::Memory | CheckError::Descriptor(DescriptorError::Changing) => None,
        _ if complaint.get().is_some() => complaint.get(),
        _ if missing.get() => None,
        error => {
            error.report();
            Some(COMPLAINT_INVALID)
        }
    })
}

/// A slot that a file has. No other file gets it, also not later, unless it lists tokens.
pub(crate) struct Claim {
    slot: Arc<Slot>,
    user: u64,
}

/// Takes the slot whose token has this digest: `ENOENT` where none has, or it was taken before.
pub(crate) fn claim(digest: &[u8; 32]) -> Result<Claim> {
    for slot in SLOTS.lock().iter() {
        if let Some(user) = slot.claim(digest)? {
            return Ok(Claim {
                slot: slot.clone(),
                user,
            });
        }
    }
    Err(ENOENT)
}

/// A token of a slot's token list, not used yet.
pub(crate) struct ListedToken {
    slot: Arc<Slot>,
    entry: usize,
    digest: Digest,
}

/// Finds the token with this SHA-256 in the token lists: `ENOENT` where none has it.
pub(crate) fn find_token(sha256: &[u8; 32]) -> Result<ListedToken> {
    let digest = token_list::digest(sha256);
    let mut found = None;
    for slot in SLOTS.lock().iter() {
        if let Some(entry) = slot.find_token(&digest) {
            found = Some((slot.clone(), entry));
        }
    }
    let (slot, entry) = found.ok_or(ENOENT)?;
    Ok(ListedToken {
        slot,
        entry,
        digest,
    })
}

impl ListedToken {
    /// Takes its slot for one more file. The token stays good.
    pub(crate) fn share(&self) -> Result<Claim> {
        let user = self.slot.share()?.ok_or(ENOENT)?;
        Ok(Claim {
            slot: self.slot.clone(),
            user,
        })
    }

    /// Uses it: `ENOENT` where it was used or withdrawn meanwhile.
    pub(crate) fn use_once(&self) -> Result {
        if self.slot.use_token(self.entry, &self.digest) {
            Ok(())
        } else {
            Err(ENOENT)
        }
    }

    /// Whether the claim is of its slot.
    pub(crate) fn is_of(&self, claim: &Claim) -> bool {
        Arc::ptr_eq(&self.slot, &claim.slot)
    }
}

impl Claim {
    /// The file uses nothing of it any more.
    pub(crate) fn let_go(&self) {
        self.slot.let_go(self.user);
    }

    /// The file did not come to use it: another one may take it.
    pub(crate) fn put_back(&self) {
        self.slot.put_back(self.user);
    }

    /// Nothing of a generation before this one is used any more.
    pub(crate) fn followed(&self, generation: u64) {
        self.slot.followed(self.user, generation);
    }

    /// Where window `number` is.
    pub(crate) fn window(&self, number: u32) -> Option<Extent> {
        let digest = self.digest()?;
        let bar = window(&SLOTS.lock(), &digest, number)?.ok()?;
        Some(Extent {
            start: bar.start,
            len: bar.len,
            bar: Some(bar),
        })
    }
}

impl Deref for Claim {
    type Target = Arc<Slot>;

    fn deref(&self) -> &Arc<Slot> {
        &self.slot
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        self.let_go();
    }
}
