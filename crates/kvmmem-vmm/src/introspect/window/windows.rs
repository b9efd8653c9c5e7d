// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Views of a machine: ATTACH and DETACH.
//!
//! The table's lock is held while slots are added and deleted, but not while a token is redeemed,
//! which may wait for the broker.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvm_ioctls::Cap;
use kvmmem_abi::hypercall::AttachResult;
use kvmmem_client::vmm::{Region, Rights, Token, ViewCounters};
use kvmmem_sys::memslot::Memslot;
use kvmmem_sys::window::{LARGE_PAGE, PoisonFile};
use sha2::{Digest, Sha256};
use vmm_sys_util::eventfd::EventFd;
use zeroize::Zeroizing;

use super::area::{Area, lay_out};
use super::descriptors::{Descriptors, MAX_VIEWS, PAGES_LEN};
use super::error::{SetUpError, WindowError};
use super::table::Table;
use super::view::{MappedRange, State, TakeError, View, show};
use super::worker::Worker;
use crate::introspect::source::{TargetMemory, TokenSource, ViewGrant, is_own};
use crate::machine::introspector::Hardware;
use crate::machine::stop::GenerationEnd;

/// The most memory slots of a view, with those of ranges that its target no longer has.
pub(crate) const MAX_SLOTS_PER_VIEW: usize = 2 * kvmmem_abi::descriptor::MAX_RANGES;

/// First of the slots' numbers; RAM's are below.
const FIRST_SLOT: u32 = 16;

/// What the windows are made for.
pub(crate) struct Host {
    pub(crate) hardware: Hardware,
    pub(crate) source: Arc<dyn TokenSource>,
    /// Device and inode of the machine's own RAM.
    pub(crate) own_file: (u64, u64),
    /// End of the machine's RAM.
    pub(crate) ram_end: u64,
    /// Interrupts the guest: descriptor pages have changed without its doing.
    pub(crate) interrupt: EventFd,
}

/// The views of a machine, between two resets.
pub(crate) struct Windows {
    pub(super) host: Host,
    pub(super) poison: PoisonFile,
    pub(super) worker: Worker,
    table: Arc<Mutex<Table>>,
    /// Memory could not be taken from the guest, and the machine ends: nothing is confirmed any
    /// more.
    has_failed: AtomicBool,
    /// The descriptor pages, as the guest has them.
    _pages: Memslot,
    start: u64,
}

impl Windows {
    /// No views yet, but the pages for their descriptors.
    ///
    /// # Errors
    /// [`SetUpError`].
    pub(crate) fn new(host: Host) -> Result<Self, SetUpError> {
        let mut area = Area::new(host.ram_end, host.hardware.address_bits);
        let start = area.start();
        let gpa = area
            .take(PAGES_LEN, LARGE_PAGE)
            .ok_or(SetUpError::NoSpace { start, address_bits: host.hardware.address_bits })?;
        let descriptors = Descriptors::new(gpa)?;
        let pages = descriptors.show(&host.hardware.vm, FIRST_SLOT)?;
        let most =
            u32::try_from(host.hardware.vm.check_extension_int(Cap::NrMemslots)).unwrap_or(0);
        let wanted = u32::try_from(MAX_VIEWS * MAX_SLOTS_PER_VIEW).unwrap_or(0);
        // Taken from the end, so the lowest first.
        let slots = (FIRST_SLOT + 1..most.min(FIRST_SLOT + 1 + wanted)).rev().collect();
        let table = Arc::new(Mutex::new(Table::new(descriptors, area, slots)));
        let (shared, source) = (table.clone(), host.source.clone());
        let worker =
            Worker::start(move || lock(&shared).tell(&*source)).map_err(SetUpError::Thread)?;
        let poison = PoisonFile::new().map_err(SetUpError::Poison)?;
        let has_failed = AtomicBool::new(false);
        Ok(Self { host, poison, worker, table, has_failed, _pages: pages, start })
    }

    /// Shows the view that `trade` gets for a token. `trade` is not called where no view could be
    /// shown.
    ///
    /// # Errors
    /// [`WindowError`]; no view is left open.
    pub(crate) fn attach(
        &self,
        token: &Token,
        read_only: bool,
        trade: impl FnOnce() -> Result<ViewGrant, WindowError>,
    ) -> Result<AttachResult, WindowError> {
        let mut table = self.lock();
        let (index, losses) = (table.reserve_index(), table.losses);
        drop(table);
        let index = index.ok_or(WindowError::NoDescriptor)?;
        let opened = trade().and_then(|mut attached| {
            if read_only {
                attached.scope = attached.scope.at_most(Rights::ReadOnly);
            }
            let view = attached.view;
            let mut table = self.lock();
            // Its number means another view on a later connection.
            if table.losses != losses {
                return Err(WindowError::GenerationEnd { view });
            }
            self.open(&mut table, index, attached, digest(token))
                .inspect_err(|_| self.tell_end(view, ViewCounters::default()))
        });
        if opened.is_err() {
            self.lock().release_index(index);
        }
        opened
    }

    /// Shows what was attached. An end of it that came before is seen here, one that comes later
    /// finds the view in the table.
    fn open(
        &self,
        table: &mut Table,
        index: usize,
        attached: ViewGrant,
        token_digest: [u8; 32],
    ) -> Result<AttachResult, WindowError> {
        let view = attached.view;
        let target = self.host.source.current(view).ok_or(WindowError::GenerationEnd { view })?;
        if is_own(&*target, self.host.own_file).map_err(WindowError::Examine)? {
            return Err(WindowError::OwnMemory);
        }
        let regions = attached.scope.regions(target.map());
        if regions.len() > kvmmem_abi::descriptor::MAX_RANGES {
            return Err(WindowError::TooManyRanges { count: regions.len() });
        }
        let layout = lay_out(&regions, 0).ok_or(WindowError::NoSpace { len: u64::MAX })?;
        let gpa = table
            .area
            .take(layout.len, layout.alignment)
            .ok_or(WindowError::NoSpace { len: layout.len })?;
        let mut view = View {
            number: view,
            grant: attached.grant,
            uuid: target.uuid(),
            target: Some(target.clone()),
            scope: attached.scope,
            token_digest,
            state: State::Open,
            gpa,
            len: layout.len,
            shown: Vec::with_capacity(regions.len()),
            poisoned: Vec::new(),
            counters: ViewCounters::default(),
            told: ViewCounters::default(),
        };
        for (region, offset) in regions.iter().zip(layout.offsets) {
            if let Err(error) = self.show(table, &mut view, &*target, *region, offset) {
                self.vacate(table, view);
                return Err(error);
            }
        }
        let descriptor_gpa = table.descriptors.gpa(index);
        table.open(index, view);
        Ok(AttachResult {
            descriptor_gpa,
            window_gpa: gpa,
            window_len: layout.len.next_multiple_of(kvmmem_sys::ram::PAGE_SIZE),
            reserved: 0,
        })
    }

    /// Shows one more region of `target` at `offset` of a view's part of the window.
    pub(super) fn show(
        &self,
        table: &mut Table,
        view: &mut View,
        target: &dyn TargetMemory,
        region: Region,
        offset: u64,
    ) -> Result<(), WindowError> {
        let slot = table.take_slot().ok_or(WindowError::NoSlot)?;
        let gpa = view.gpa.saturating_add(offset);
        match show(&self.host.hardware.vm, target, &region, view.access(), slot, gpa) {
            Ok(slot) => {
                view.shown.push(MappedRange { region, offset, slot });
                Ok(())
            }
            Err(error) => {
                table.give_back_slot(slot);
                Err(WindowError::Show(error))
            }
        }
    }

    /// Closes the view whose descriptor page is at `gpa`.
    ///
    /// # Errors
    /// [`WindowError::NoView`].
    pub(crate) fn detach(&self, gpa: u64) -> Result<(), WindowError> {
        let mut table = self.lock();
        let index = table.descriptors.index(gpa);
        let view = index.and_then(|index| table.close(index)).ok_or(WindowError::NoView { gpa })?;
        self.finish(&mut table, view);
        Ok(())
    }

    /// Closes all views.
    pub(crate) fn close_all(&self) {
        let mut table = self.lock();
        for index in 0..MAX_VIEWS {
            if let Some(view) = table.close(index) {
                self.finish(&mut table, view);
            }
        }
    }

    fn finish(&self, table: &mut Table, view: View) {
        let (number, state, counters) = (view.number, view.state, view.counters);
        self.vacate(table, view);
        // One that has ended otherwise is the broker's no more, and its number means another view
        // on a later connection.
        if state == State::Open {
            self.tell_end(number, counters);
        }
    }

    /// Reports that a view is closed, which confirms a revocation of its grant too.
    fn tell_end(&self, view: u64, counters: ViewCounters) {
        if !self.has_failed() {
            self.host.source.detached(view, counters);
        }
    }

    /// Ends all views: the connection to the broker is lost.
    pub(crate) fn lost(self: &Arc<Self>) {
        self.lock().losses += 1;
        self.end(State::Gone, |_| true);
    }

    fn vacate(&self, table: &mut Table, view: View) {
        match table.vacate(view, &self.poison) {
            Ok(behind) => self.worker.unmap(behind),
            Err(error) => self.give_up(error),
        }
    }

    /// Ends the machine: the last that can be done for a target whose memory cannot be taken from
    /// the guest.
    pub(super) fn give_up(&self, error: TakeError) {
        self.has_failed.store(true, Ordering::SeqCst);
        self.host.hardware.stop.end(GenerationEnd::Failed(error.into()));
    }

    pub(super) fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::SeqCst)
    }

    /// Whether `gpa`, where the guest wrote and nothing takes writes, is part of the windows; the
    /// write is counted.
    pub(crate) fn refuse_write(&self, gpa: u64) -> bool {
        if gpa < self.start {
            return false;
        }
        let mut table = self.lock();
        let mut views = table.views();
        if let Some(view) =
            views.find(|view| gpa.checked_sub(view.gpa).is_some_and(|at| at < view.len))
        {
            view.counters.refused_writes += 1;
            drop(views);
            self.count(&mut table);
        }
        true
    }

    pub(super) fn count(&self, table: &mut Table) {
        if !table.is_telling {
            table.is_telling = self.worker.tell();
        }
    }

    /// Has the guest read descriptor pages again.
    pub(super) fn interrupt(&self) {
        // Fails only when the counter is full: then the interrupt is pending anyway.
        let _ = self.host.interrupt.write(1);
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Table> {
        lock(&self.table)
    }
}

impl Drop for Windows {
    fn drop(&mut self) {
        self.close_all();
    }
}

fn lock(table: &Mutex<Table>) -> MutexGuard<'_, Table> {
    table.lock().unwrap_or_else(PoisonError::into_inner)
}

fn digest(token: &Token) -> [u8; 32] {
    Sha256::digest(*Zeroizing::new(token.to_bytes())).into()
}
