// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Table of a machine's views by descriptor index, with the free address space and slot numbers.

use kvmmem_sys::memslot::Memslot;
use kvmmem_sys::window::{GuestMapping, PoisonFile};

use super::area::Area;
use super::descriptors::{Descriptors, MAX_VIEWS};
use super::view::{State, TakeError, View, delete};
use crate::introspect::source::TokenSource;

/// What a descriptor index is used for.
enum Entry {
    Free,
    /// A token is being exchanged for a view.
    Reserved,
    Open(Box<View>),
}

/// The views by descriptor index.
pub(super) struct Table {
    entries: [Entry; MAX_VIEWS],
    pub(super) descriptors: Descriptors,
    pub(super) area: Area,
    /// Unused slot numbers.
    slots: Vec<u32>,
    /// Whether the worker knows that counters have changed.
    pub(super) is_telling: bool,
    /// How often the connection to the broker was lost: views' numbers start anew with each.
    pub(super) losses: u64,
}

impl Table {
    pub(super) fn new(descriptors: Descriptors, area: Area, slots: Vec<u32>) -> Self {
        Self {
            entries: [const { Entry::Free }; MAX_VIEWS],
            descriptors,
            area,
            slots,
            is_telling: false,
            losses: 0,
        }
    }

    /// Reserves a descriptor index for a view that is about to be attached.
    pub(super) fn reserve_index(&mut self) -> Option<usize> {
        let index = self.entries.iter().position(|entry| matches!(entry, Entry::Free))?;
        *self.entries.get_mut(index)? = Entry::Reserved;
        Some(index)
    }

    /// Releases a reserved index whose view was not attached.
    pub(super) fn release_index(&mut self, index: usize) {
        if let Some(entry @ Entry::Reserved) = self.entries.get_mut(index) {
            *entry = Entry::Free;
        }
    }

    /// Stores the view of a reserved index, and writes its descriptor page.
    pub(super) fn open(&mut self, index: usize, view: View) {
        if let Some(entry) = self.entries.get_mut(index) {
            *entry = Entry::Open(Box::new(view));
            self.describe(index);
        }
    }

    /// Writes the descriptor page of a view that [`Table::lift`] took out, under the next
    /// generation.
    pub(super) fn describe_lifted(&mut self, index: usize, view: &View) {
        let (content, ranges) = view.describe();
        self.descriptors.write(index, &content, &ranges);
    }

    /// Takes a view out for a change and keeps its index reserved; [`Table::open`] puts it back.
    pub(super) fn lift(&mut self, index: usize) -> Option<View> {
        let entry = self.entries.get_mut(index).filter(|entry| matches!(entry, Entry::Open(_)))?;
        match std::mem::replace(entry, Entry::Reserved) {
            Entry::Open(view) => Some(*view),
            Entry::Free | Entry::Reserved => None,
        }
    }

    /// Removes a view and clears its descriptor page.
    pub(super) fn close(&mut self, index: usize) -> Option<View> {
        let view = self.lift(index)?;
        self.release_index(index);
        self.descriptors.clear(index);
        Some(view)
    }

    /// Writes a view's descriptor page, under the next generation.
    pub(super) fn describe(&mut self, index: usize) {
        if let Some(Entry::Open(view)) = self.entries.get(index) {
            let (content, ranges) = view.describe();
            self.descriptors.write(index, &content, &ranges);
        }
    }

    /// The view of a descriptor index.
    pub(super) fn view(&mut self, index: usize) -> Option<&mut View> {
        match self.entries.get_mut(index)? {
            Entry::Open(view) => Some(view),
            Entry::Free | Entry::Reserved => None,
        }
    }

    /// All views.
    pub(super) fn views(&mut self) -> impl Iterator<Item = &mut View> {
        self.entries.iter_mut().filter_map(|entry| match entry {
            Entry::Open(view) => Some(&mut **view),
            Entry::Free | Entry::Reserved => None,
        })
    }

    /// The views of these descriptor indices.
    pub(super) fn views_at(&mut self, indices: &[usize]) -> impl Iterator<Item = &mut View> {
        self.entries.iter_mut().enumerate().filter_map(|(index, entry)| match entry {
            Entry::Open(view) if indices.contains(&index) => Some(&mut **view),
            _ => None,
        })
    }

    /// The descriptor indices of the open views that `is_meant` selects.
    pub(super) fn open_indices(&self, is_meant: impl Fn(&View) -> bool) -> Vec<usize> {
        let meant = |(index, entry): (usize, &Entry)| match entry {
            Entry::Open(view) if view.state == State::Open && is_meant(view) => Some(index),
            _ => None,
        };
        self.entries.iter().enumerate().filter_map(meant).collect()
    }

    /// Takes an unused slot number.
    pub(super) fn take_slot(&mut self) -> Option<u32> {
        self.slots.pop()
    }

    /// Returns a slot number.
    pub(super) fn give_back_slot(&mut self, slot: u32) {
        self.slots.push(slot);
    }

    /// Removes a closed view's slots from the guest and frees its area; returns the mappings behind
    /// the slots. Slots that KVM does not remove stay as poison, and the area stays in use.
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
            // They are never looked at again: the guest keeps them until its machine ends.
            let View { shown, poisoned, .. } = view;
            std::mem::forget((
                shown.into_iter().map(|shown| shown.slot).collect::<Vec<Memslot>>(),
                poisoned,
            ));
        }
        Ok(behind)
    }

    /// Reports changed counters to `source`.
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
