// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Changes of views that the guest does not ask for: revoked, ended, and of the target's memory.
//!
//! Pausing the vCPUs ends all access at once, however large a view is. Then each slot gets poison,
//! the vCPUs run again, and the worker unmaps what was behind the slots.

use std::sync::Arc;

use kvmmem_abi::descriptor::MAX_RANGES;
use kvmmem_client::vmm::Region;
use kvmmem_sys::memslot::Memslot;
use kvmmem_sys::window::GuestMapping;

use super::area::lay_out;
use super::table::Table;
use super::view::{State, View, delete, poison_for, poison_in_place, replace};
use super::windows::{MAX_SLOTS_PER_VIEW, Windows};
use crate::introspect::source::TargetMemory;
use crate::limit::warn_limited;
use crate::machine::rendezvous::PauseGuard;

impl Windows {
    /// Ends the views that `is_meant` picks, with the state `state`. Returns whether the guest does
    /// not reach them any more; where it does, the machine ends. The guest may stand still for some
    /// time more, for KVM takes its time to change slots.
    pub(crate) fn end(self: &Arc<Self>, state: State, is_meant: impl Fn(&View) -> bool) -> bool {
        let mut table = self.lock();
        let indices = table.open_indices(is_meant);
        if indices.is_empty() {
            return !self.has_failed();
        }
        let paused = self.pause();
        for &index in &indices {
            if let Some(view) = table.view(index) {
                view.end(state);
            }
            table.describe(index);
        }
        drop(table);
        self.interrupt();
        let Some(paused) = paused else {
            return self.poison_ended(&indices, false);
        };
        // A vCPU that was paused does not enter the guest of a machine that ends.
        let (windows, held, later) = (self.clone(), paused.clone(), indices.clone());
        let swap = move || {
            windows.poison_ended(&later, true);
            drop(held);
        };
        if let Err(source) = std::thread::Builder::new().name("views-end".into()).spawn(swap) {
            warn_limited!(%source, "no thread to end views by");
            self.poison_ended(&indices, true);
        }
        !self.has_failed()
    }

    /// Puts poison behind the slots of those of these views that have ended and are still there.
    /// Returns whether the guest does not reach what was there.
    fn poison_ended(&self, indices: &[usize], is_paused: bool) -> bool {
        let mut table = self.lock();
        let ended = table.views_at(indices).filter(|view| view.state != State::Open);
        let (behind, is_done) = self.poison(ended.flat_map(View::slots), is_paused);
        drop(table);
        self.worker.unmap(behind);
        is_done
    }

    /// Pauses the vCPUs until the result is dropped; `None` if they do not leave the guest.
    fn pause(&self) -> Option<PauseGuard> {
        self.host
            .hardware
            .rendezvous
            .pause()
            .inspect_err(|error| warn_limited!(%error, "views end or change while the guest runs"))
            .ok()
    }

    /// Puts poison behind slots. Returns what was there, and whether all of them have it.
    fn poison<'a>(
        &self,
        slots: impl Iterator<Item = &'a mut Memslot>,
        is_paused: bool,
    ) -> (Vec<GuestMapping>, bool) {
        let (mut behind, mut is_done) = (Vec::new(), true);
        for slot in slots.filter(|slot| !slot.is_empty()) {
            let taken = match poison_for(slot, &self.poison) {
                Ok(poison) if is_paused => replace(slot, poison, &self.poison),
                Ok(_) => poison_in_place(slot, &self.poison).map(|()| None),
                Err(error) => {
                    warn_limited!(
                        error = &error as &dyn std::error::Error,
                        "a hole is left where a view has ended"
                    );
                    delete(slot, &self.poison)
                }
            };
            match taken {
                Ok(before) => behind.extend(before),
                Err(error) => {
                    self.give_up(error);
                    is_done = false;
                }
            }
        }
        (behind, is_done)
    }

    /// Shows what a target's memory is now. Ranges that are as they were stay where they are.
    pub(crate) fn follow(&self, target: &Arc<dyn TargetMemory>) {
        let mut table = self.lock();
        for index in table.open_indices(|view| view.is_of(target.id())) {
            let Some(mut view) = table.lift(index) else { continue };
            let regions = view.scope.regions(target.map());
            view.target = Some(target.clone());
            let retired = view.retire(&regions);
            let paused = if retired.is_empty() { None } else { self.pause() };
            if paused.is_none() && !retired.is_empty() {
                // Who copies out of a range that is about to be poison must find a new generation
                // behind the copy.
                table.describe_lifted(index, &view);
            }
            let (behind, _) =
                self.poison(view.poisoned.iter_mut().skip(retired.start), paused.is_some());
            self.show_more(&mut table, &mut view, &**target, &regions);
            table.open(index, view);
            drop(paused);
            self.interrupt();
            self.worker.unmap(behind);
        }
    }

    /// Shows those of `regions` that a view does not show yet, as far as there is room behind the
    /// others.
    fn show_more(
        &self,
        table: &mut Table,
        view: &mut View,
        target: &dyn TargetMemory,
        regions: &[Region],
    ) {
        let new: Vec<Region> =
            regions.iter().filter(|region| !view.shows(region)).copied().collect();
        let room = MAX_RANGES - view.shown.len().min(MAX_RANGES);
        let slots_left = MAX_SLOTS_PER_VIEW.saturating_sub(view.shown.len() + view.poisoned.len());
        let layout = lay_out(&new, view.len).filter(|layout| table.area.grow(view.gpa, layout.len));
        let (Some(layout), true) = (layout, new.len() <= room.min(slots_left)) else {
            let ranges = new.len();
            warn_limited!(ranges, "no room in a view for new ranges of its target");
            return;
        };
        for (region, offset) in new.iter().zip(layout.offsets) {
            match self.show(table, view, target, *region, offset) {
                Ok(()) => view.len = offset + region.len,
                Err(error) => warn_limited!(
                    error = &error as &dyn std::error::Error,
                    "a new range of a target is not shown"
                ),
            }
        }
        view.shown.sort_unstable_by_key(|shown| shown.region.gpa);
    }
}
