// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Retired ports: PCI buses of an introspector that no view is plugged into before it is reset.
//!
//! A tool that does without the module maps PCI devices by itself, and unplugging them does not
//! take the mappings away: they show what is plugged in next at that address. So the tool
//! acknowledges that it has removed them, in the descriptor page or by the end of its connection.
//! Where it has not by the time at which the devices are gone, nothing more comes to that address:
//! the bus is retired. The slots of one bus share its addresses.
//!
//! The bus was marked in QEMU before the view was plugged in ([`Mark`]), so that a later broker
//! knows it as well.

use std::collections::BTreeMap;

use kvmmem_qemu::monitor::Counts;
use kvmmem_qemu::windows::pci_slots::PciSlot;
use kvmmem_qemu::windows::plug::Mark;

/// Buses by their marks, each with how often the VM had been reset by then.
#[derive(Debug, Default)]
pub(super) struct RetiredPorts(BTreeMap<Mark, u64>);

impl RetiredPorts {
    /// What an earlier broker has marked.
    pub(super) fn left_over(marks: Vec<Mark>, counts: Counts) -> Self {
        Self(marks.into_iter().map(|mark| (mark, counts.resets)).collect())
    }

    /// Adds a bus.
    pub(super) fn add(&mut self, mark: Mark, resets: u64) {
        self.0.insert(mark, resets);
    }

    /// Removes the bus of a mark that QEMU does not have any more.
    pub(super) fn remove(&mut self, mark: &Mark) {
        self.0.remove(mark);
    }

    /// Those that were added before the VM was reset this often.
    pub(super) fn before(&self, resets: u64) -> Vec<Mark> {
        let is_before = |(mark, at): (&Mark, &u64)| (*at < resets).then(|| mark.clone());
        self.0.iter().filter_map(is_before).collect()
    }

    /// Whether a slot is on one of them.
    pub(super) fn has(&self, slot: &PciSlot) -> bool {
        self.0.keys().any(|mark| mark.bus == slot.bus)
    }

    /// Their names, each once.
    pub(super) fn buses(&self) -> Vec<String> {
        let mut buses: Vec<String> = self.0.keys().map(|mark| mark.bus.clone()).collect();
        buses.sort_unstable();
        buses.dedup();
        buses
    }
}
