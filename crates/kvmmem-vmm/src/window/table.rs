// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table of a machine's views, and their share of guest-physical space and of KVM's slot
//! numbers.

use kvmmem_sys::memslot::Memslot;
use kvmmem_sys::window::{GuestMapping, PoisonFile};

use super::area::Area;
use super::descriptors::{Descriptors, MAX_VIEWS};
use super::view::{State, TakeError, View, delete};
use crate::mapping::TokenSource;

/// A place for one view.
enum Seat {
    Free,
    /// A token is being traded for a view.
    Taken,
    Open(Box<View>),
}

/// All views.
pub(super) struct Table {
    seats: [Seat; MAX_VIEWS],
    pub(super) descriptors: Descriptors,
    pub(super) area: Area,
    /// Unused slot numbers.
    slots: Vec<u32>,
    /// Whether the worker knows that counters have changed.
    pub(super) is_telling: bool,
}

impl Table {
    pub(super) fn new(descriptors: Descriptors, area: Area, slots: Vec<u32>) -> Self {
        Self {
            seats: [const { Seat::Free }; MAX_VIEWS],
            descriptors,
            area,
            slots,
            is_telling: false,
        }
    }

    /// Takes a seat for a view that is about to be attached.
    pub(super) fn take_seat(&mut self) -> Option<usize> {
        let index = self.seats.iter().position(|seat| matches!(seat, Seat::Free))?;
        *self.seats.get_mut(index)? = Seat::Taken;
        Some(index)
    }

    /// Gives a seat back that came to nothing.
    pub(super) fn leave_seat(&mut self, index: usize) {
        if let Some(seat @ Seat::Taken) = self.seats.get_mut(index) {
            *seat = Seat::Free;
        }
    }

    /// Puts a view on its seat, and describes it.
    pub(super) fn open(&mut self, index: usize, view: View) {
        if let Some(seat) = self.seats.get_mut(index) {
            *seat = Seat::Open(Box::new(view));
            self.describe(index);
        }
    }

    /// Writes the descriptor page of a view that is off its seat, under the next generation.
    pub(super) fn describe_lifted(&mut self, index: usize, view: &View) {
        let (content, ranges) = view.describe();
        self.descriptors.write(index, &content, &ranges);
    }

    /// Takes a view off its seat for a change; [`Table::open`] puts it back.
    pub(super) fn lift(&mut self, index: usize) -> Option<View> {
        let seat = self.seats.get_mut(index).filter(|seat| matches!(seat, Seat::Open(_)))?;
        match std::mem::replace(seat, Seat::Taken) {
            Seat::Open(view) => Some(*view),
            Seat::Free | Seat::Taken => None,
        }
    }

    /// Takes a view off its seat; its descriptor page is empty from then on.
    pub(super) fn close(&mut self, index: usize) -> Option<View> {
        let view = self.lift(index)?;
        self.leave_seat(index);
        self.descriptors.clear(index);
        Some(view)
    }

    /// Writes a view's descriptor page, under the next generation.
    pub(super) fn describe(&mut self, index: usize) {
        if let Some(Seat::Open(view)) = self.seats.get(index) {
            let (content, ranges) = view.describe();
            self.descriptors.write(index, &content, &ranges);
        }
    }

    /// The view on a seat.
    pub(super) fn view(&mut self, index: usize) -> Option<&mut View> {
        match self.seats.get_mut(index)? {
            Seat::Open(view) => Some(view),
            Seat::Free | Seat::Taken => None,
        }
    }

    /// All views.
    pub(super) fn views(&mut self) -> impl Iterator<Item = &mut View> {
        self.seats.iter_mut().filter_map(|seat| match seat {
            Seat::Open(view) => Some(&mut **view),
            Seat::Free | Seat::Taken => None,
        })
    }

    /// The views on these seats.
    pub(super) fn views_at(&mut self, seats: &[usize]) -> impl Iterator<Item = &mut View> {
        self.seats.iter_mut().enumerate().filter_map(|(index, seat)| match seat {
            Seat::Open(view) if seats.contains(&index) => Some(&mut **view),
            _ => None,
        })
    }

    /// The seats of the views in use that `is_meant` picks.
    pub(super) fn open_seats(&self, is_meant: impl Fn(&View) -> bool) -> Vec<usize> {
        let meant = |(index, seat): (usize, &Seat)| match seat {
            Seat::Open(view) if view.state == State::Open && is_meant(view) => Some(index),
            _ => None,
        };
        self.seats.iter().enumerate().filter_map(meant).collect()
    }

    /// A slot number that nothing uses.
    pub(super) fn take_slot(&mut self) -> Option<u32> {
        self.slots.pop()
    }

    /// Gives a slot number back.
    pub(super) fn give_back_slot(&mut self, slot: u32) {
        self.slots.push(slot);
    }

    /// Takes a closed view's slots from the guest and gives its place back, and returns what was
    /// behind the slots. Slots that KVM keeps stay as poison, and so does the view's place.
    pub(super) fn vacate(
        &mut self,
        mut view: View,
        file: &PoisonFile,
    ) -> Result<Vec<GuestMapping>, TakeError> {
        let mut behind = Vec::new();
        let mut is_all_gone = true;
        for slot in view.slots() {
            behind.extend(delete(slot, file)?);
            if slot.is_empty() {
                self.slots.push(slot.slot());
            } else {
                is_all_gone = false;
            }
        }
        if is_all_gone {
            self.area.give_back(view.gpa);
        } else {
            // Nobody comes back to them: the guest keeps them until its machine ends.
            let View { shown, poisoned, .. } = view;
            std::mem::forget((
                shown.into_iter().map(|shown| shown.slot).collect::<Vec<Memslot>>(),
                poisoned,
            ));
        }
        Ok(behind)
    }

    /// Tells `source` of counters that it does not know yet.
    pub(super) fn tell(&mut self, source: &dyn TokenSource) {
        self.is_telling = false;
        for view in
            self.views().filter(|view| view.state == State::Open && view.told != view.counters)
        {
            view.told = view.counters;
            source.counters(view.number, view.counters);
        }
    }
}
