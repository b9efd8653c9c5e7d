// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Table of replaced pages, on which MAP and UNMAP work.
//!
//! States of a page: *own*, *reserved* (a token is being redeemed for it), *mapped*, perhaps
//! *revoked*, and *own* again. The table's lock is held while a page is replaced or restored, so
//! that no two vCPUs work on one page. It is not held while a token is redeemed, which may wait for
//! the broker: the reservation keeps other vCPUs from the page meanwhile.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvmmem_abi::ioctl::PAGE_SIZE;
use kvmmem_client::vmm::Rights;
use kvmmem_sys::ram::{GuestRam, RamError};

use super::error::MapError;
use crate::introspect::source::{PageGrant, TargetMemory, identity, is_own};
use crate::introspect::window::{MAX_SLOTS_PER_VIEW, MAX_VIEWS};
use crate::limit::warn_limited;

/// One entry of the table.
enum Page {
    /// A token is being redeemed for this page; it still is the machine's own.
    Reserved,
    /// A page of this target is mapped here, by this grant. The target's file is kept open: what it
    /// holds stays readable after the target's death.
    Mapped { _target: Arc<dyn TargetMemory>, grant: u64 },
    /// A page was mapped here until its grant was revoked; now it is the machine's own again.
    Revoked,
}

/// Maps pages of targets over pages of one machine's RAM.
pub(crate) struct MappingEngine {
    ram: Arc<GuestRam>,
    /// Device and inode of the machine's own memfd.
    own_file: (u64, u64),
    limit: usize,
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    pages: HashMap<u64, Page>,
    /// How often all grants have ended at once. What was redeemed before is void.
    ends: u64,
}

impl MappingEngine {
    /// An engine for `ram` that keeps at most `limit` pages replaced.
    ///
    /// # Errors
    /// What the host reports when the RAM's file cannot be examined.
    pub(crate) fn new(ram: Arc<GuestRam>, limit: usize) -> std::io::Result<Self> {
        let own_file = identity(ram.fd())?;
        Ok(Self { ram, own_file, limit, table: Mutex::default() })
    }

    /// Number of pages mapped or reserved now.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.lock().pages.len()
    }

    /// Maps the target's page at `target_gpa` in the place of the machine's page at `own_gpa`, and
    /// gives the memory of the latter back to the host.
    ///
    /// `redeem` is called at most once, and only after everything was checked that can be without
    /// it: a token is not used up by a call that could not have worked. `is_revoked` says
    /// whether a grant was revoked since: a revocation that it does not know of yet comes to
    /// [`MappingEngine::revoke`].
    ///
    /// # Errors
    /// The page is as it was, contents included.
    pub(crate) fn map(
        &self,
        own_gpa: u64,
        target_gpa: u64,
        redeem: impl FnOnce() -> Result<PageGrant, MapError>,
        is_revoked: impl FnOnce(u64) -> bool,
    ) -> Result<(), MapError> {
        if !self.ram.is_page(own_gpa) {
            return Err(MapError::OwnPage { gpa: own_gpa });
        }
        if !target_gpa.is_multiple_of(PAGE_SIZE) {
            return Err(MapError::TargetAlignment { gpa: target_gpa });
        }
        let ends = self.reserve(own_gpa)?;
        let replaced = self.replace(own_gpa, target_gpa, ends, redeem, is_revoked);
        if replaced.is_err() {
            self.lock().pages.remove(&own_gpa);
        }
        replaced
    }

    /// Undoes [`MappingEngine::map`]: the page at `own_gpa` becomes the machine's own again,
    /// zeroed.
    ///
    /// # Errors
    /// [`MapError::NotMapped`]; [`MapError::Host`], and the page stays mapped.
    pub(crate) fn unmap(&self, own_gpa: u64) -> Result<(), MapError> {
        if !self.ram.is_page(own_gpa) {
            return Err(MapError::OwnPage { gpa: own_gpa });
        }
        let pages = &mut self.lock().pages;
        match pages.get(&own_gpa) {
            Some(Page::Mapped { .. } | Page::Revoked) => {}
            Some(Page::Reserved) | None => return Err(MapError::NotMapped { gpa: own_gpa }),
        }
        self.restore(own_gpa).map_err(MapError::Host)?;
        pages.remove(&own_gpa);
        Ok(())
    }

    /// Undoes all mappings: the pages are the machine's own again, zeroed. Pages that another vCPU
    /// is mapping at this moment are left to it.
    ///
    /// # Errors
    /// The first failure; what could not be undone stays in the table.
    pub(crate) fn unmap_all(&self) -> Result<(), MapError> {
        self.undo_all(|gpa, _| self.restore(gpa))
    }

    /// As [`MappingEngine::unmap_all`], but the pages keep what they show. No vCPU should run
    /// meanwhile: what it writes into a page that is being copied is lost.
    ///
    /// # Errors
    /// As [`MappingEngine::unmap_all`].
    pub(crate) fn unmap_all_keeping(&self) -> Result<(), MapError> {
        self.undo_all(|gpa, page| match page {
            Page::Mapped { .. } => self.ram.keep_page(gpa),
            Page::Reserved | Page::Revoked => Ok(()),
        })
    }

    fn undo_all(&self, undo: impl Fn(u64, &Page) -> Result<(), RamError>) -> Result<(), MapError> {
        let mut done = Ok(());
        self.lock().pages.retain(|&gpa, page| {
            if matches!(page, Page::Reserved) {
                return true;
            }
            let undone = undo(gpa, page).map_err(MapError::Host);
            let failed = undone.is_err();
            done = std::mem::replace(&mut done, Ok(())).and(undone);
            failed
        });
        done
    }

    /// Revokes what a grant allowed: the pages mapped by it become the machine's own again, zeroed.
    /// They still have to be unmapped to be mapped anew. Safe while vCPUs run.
    ///
    /// # Errors
    /// The first failure; the others are done nevertheless.
    pub(crate) fn revoke(&self, grant: u64) -> Result<(), MapError> {
        self.revoke_pages(&mut self.lock(), |its| its == grant)
    }

    /// Revokes what all grants allowed, as [`MappingEngine::revoke`] does for one. Tokens that were
    /// redeemed before and whose pages are not mapped yet are void.
    ///
    /// # Errors
    /// As [`MappingEngine::revoke`].
    pub(crate) fn revoke_all(&self) -> Result<(), MapError> {
        let mut table = self.lock();
        table.ends += 1;
        self.revoke_pages(&mut table, |_| true)
    }

    fn revoke_pages(
        &self,
        table: &mut Table,
        is_meant: impl Fn(u64) -> bool,
    ) -> Result<(), MapError> {
        let mut done = Ok(());
        for (&gpa, page) in &mut table.pages {
            if matches!(page, Page::Mapped { grant, .. } if is_meant(*grant)) {
                match self.restore(gpa) {
                    Ok(()) => *page = Page::Revoked,
                    Err(error) => done = done.and(Err(MapError::Host(error))),
                }
            }
        }
        done
    }

    /// Reserves a page; returns how often all grants had ended by then.
    fn reserve(&self, own_gpa: u64) -> Result<u64, MapError> {
        let table = &mut *self.lock();
        let full = table.pages.len() >= self.limit;
        match table.pages.entry(own_gpa) {
            Entry::Occupied(_) => Err(MapError::InUse { gpa: own_gpa }),
            Entry::Vacant(_) if full => Err(MapError::Limit { limit: self.limit }),
            Entry::Vacant(entry) => {
                entry.insert(Page::Reserved);
                Ok(table.ends)
            }
        }
    }

    fn replace(
        &self,
        own_gpa: u64,
        target_gpa: u64,
        ends: u64,
        redeem: impl FnOnce() -> Result<PageGrant, MapError>,
        is_revoked: impl FnOnce(u64) -> bool,
    ) -> Result<(), MapError> {
        let PageGrant { grant, target, scope } = redeem()?;
        if scope.rights != Rights::ReadWrite {
            return Err(MapError::ReadOnly { grant });
        }
        let hole = MapError::TargetHole { gpa: target_gpa };
        let place = target.map().resolve(target_gpa).filter(|_| scope.contains(target_gpa));
        let place = place.and_then(|(file, offset)| Some((target.file(file)?, offset)));
        let Some((file, offset)) = place else {
            return Err(hole);
        };
        match is_own(&*target, self.own_file) {
            Ok(true) => return Err(MapError::OwnMemory),
            Ok(false) => {}
            Err(_) => return Err(hole),
        }
        let mut table = self.lock();
        if table.ends != ends || is_revoked(grant) {
            return Err(MapError::Revoked { grant });
        }
        self.ram.replace_page(own_gpa, file, offset).map_err(MapError::Host)?;
        if let Err(error) = self.ram.punch_page(own_gpa) {
            // The page's contents are still there: map them back rather than hold the memory twice.
            match self.ram.restore_page(own_gpa) {
                Ok(()) => return Err(MapError::Host(error)),
                Err(second) => warn_limited!(
                    error = &second as &dyn std::error::Error,
                    "the own page stays allocated behind the mapping at {own_gpa:#x}"
                ),
            }
        }
        table.pages.insert(own_gpa, Page::Mapped { _target: target, grant });
        Ok(())
    }

    /// A fresh zero page at `gpa`. Punched first: another reader of the machine's memory may have
    /// filled the hole.
    fn restore(&self, gpa: u64) -> Result<(), RamError> {
        self.ram.punch_page(gpa)?;
        self.ram.restore_page(gpa)
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many pages an engine may replace before `mmap` could fail for want of mappings: each may
/// split one mapping of the process in three, so half of what `vm.max_map_count` leaves, less a
/// reserve for the process itself and for views.
pub fn mapping_limit() -> usize {
    const PROCESS: usize = 2048;
    const RESERVE: usize = PROCESS + MAX_VIEWS * MAX_SLOTS_PER_VIEW;
    /// The kernel's default (Documentation/admin-guide/sysctl/vm.rst).
    const DEFAULT_MAX: usize = 65_530;
    let most = std::fs::read_to_string("/proc/sys/vm/max_map_count")
        .ok()
        .and_then(|text| text.trim().parse().ok())
        .unwrap_or(DEFAULT_MAX);
    most.saturating_sub(RESERVE) / 2
}

#[cfg(test)]
#[path = "engine_tests.rs"]
mod tests;
