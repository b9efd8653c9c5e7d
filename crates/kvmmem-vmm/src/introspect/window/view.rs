// SPDX-License-Identifier: Apache-2.0 OR MIT
//! View: its ranges, the memory slots that map them, and the poison that replaces them at its end.

use std::ops::Range;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use kvmmem_abi::descriptor::{Descriptor, WindowRange};
use kvmmem_abi::native::{RIGHT_READ, RIGHT_WRITE, STATE_GONE, STATE_OPEN, STATE_REVOKED};
use kvmmem_client::vmm::{Region, Rights, Scope, ViewCounters};
use kvmmem_sys::memslot::{Memslot, SlotError};
use kvmmem_sys::window::{Access, GuestMapping, MappingError, PoisonFile};

use crate::introspect::source::TargetMemory;
use crate::limit::warn_limited;

/// What has become of a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// In use.
    Open,
    /// Its grant was revoked.
    Revoked,
    /// Its target, or who could take its grant back, is gone.
    Gone,
}

impl State {
    fn number(self) -> u32 {
        match self {
            Self::Open => STATE_OPEN,
            Self::Revoked => STATE_REVOKED,
            Self::Gone => STATE_GONE,
        }
    }
}

/// Why a range is not shown.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShowError {
    /// The target has no such file.
    #[error("the target's memory at GPA {gpa:#x} is in file {file}, which it has not")]
    File {
        /// The target's GPA.
        gpa: u64,
        /// The file's number.
        file: u32,
    },
    /// The target's memory could not be mapped.
    #[error("cannot map the target's memory at GPA {gpa:#x}")]
    Map {
        /// The target's GPA.
        gpa: u64,
        /// Why.
        source: MappingError,
    },
    /// KVM did not take the memory slot.
    #[error("cannot show the target's memory at GPA {gpa:#x}")]
    Slot {
        /// The target's GPA.
        gpa: u64,
        /// Why.
        source: SlotError,
    },
}

/// A slot that could not be removed from the guest: KVM and the kernel's `mmap` both failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot take memory slot {slot} at GPA {gpa:#x} from the guest")]
pub struct TakeError {
    /// Number of the slot.
    slot: u32,
    /// Its first GPA.
    gpa: u64,
    /// Why.
    source: MappingError,
}

/// A range of the target's memory and the slot that maps it.
pub(super) struct MappedRange {
    pub(super) region: Region,
    /// Offset in the view's part of the window.
    pub(super) offset: u64,
    pub(super) slot: Memslot,
}

/// An attached view.
pub(crate) struct View {
    /// Its number at the source.
    pub(super) number: u64,
    /// Number of its grant.
    pub(crate) grant: u64,
    /// The target's UUID.
    pub(super) uuid: [u8; 16],
    /// The target as last reported; `None` once the view has ended, so that a guest that does not
    /// detach keeps no memory.
    pub(super) target: Option<Arc<dyn TargetMemory>>,
    pub(super) scope: Scope,
    pub(super) token_digest: [u8; 32],
    pub(super) state: State,
    /// First GPA of its part of the window.
    pub(super) gpa: u64,
    /// Length of that in bytes, as far as it is used.
    pub(super) len: u64,
    /// By rising target GPA.
    pub(super) shown: Vec<MappedRange>,
    /// Slots of ranges that the target no longer has.
    pub(super) poisoned: Vec<Memslot>,
    pub(super) counters: ViewCounters,
    /// The counters as the source knows them.
    pub(super) told: ViewCounters,
}

impl View {
    /// What its descriptor page says.
    pub(super) fn describe(&self) -> (Descriptor, Vec<WindowRange>) {
        let rights = match self.scope.rights {
            Rights::ReadOnly => RIGHT_READ,
            Rights::ReadWrite => RIGHT_READ | RIGHT_WRITE,
        };
        let ranges: Vec<WindowRange> = self
            .shown
            .iter()
            .map(|MappedRange { region, offset, .. }| WindowRange {
                gpa: region.gpa,
                len: region.len,
                offset: *offset,
                window: 0,
            })
            .collect();
        let content = Descriptor {
            generation: 0,
            state: self.state.number(),
            rights,
            token_digest: self.token_digest,
            uuid: self.uuid,
            window_gpa: self.gpa,
            window_len: self.len.next_multiple_of(kvmmem_sys::ram::PAGE_SIZE),
            range_count: ranges.len(),
            flags: 0,
            instance: self.target.as_ref().map_or(0, |target| target.generation()),
        };
        (content, ranges)
    }

    /// What the guest may do with its ranges.
    pub(super) fn access(&self) -> Access {
        match self.scope.rights {
            Rights::ReadOnly => Access::ReadOnly,
            Rights::ReadWrite => Access::ReadWrite,
        }
    }

    /// Whether it shows memory of this target.
    pub(crate) fn is_of(&self, target: u64) -> bool {
        self.target.as_ref().is_some_and(|own| own.id() == target)
    }

    /// Releases the target. Its slots have poison behind them.
    pub(super) fn end(&mut self, state: State) {
        self.state = state;
        self.target = None;
    }

    /// All slots, to remove them from the guest.
    pub(super) fn slots(&mut self) -> impl Iterator<Item = &mut Memslot> {
        self.shown.iter_mut().map(|shown| &mut shown.slot).chain(&mut self.poisoned)
    }

    /// Whether a region is shown, as it is.
    pub(super) fn shows(&self, region: &Region) -> bool {
        self.shown.iter().any(|shown| shown.region == *region)
    }

    /// Takes the ranges that are none of `regions` off the list, and returns which of the poisoned
    /// slots are theirs: they need poison.
    pub(super) fn retire(&mut self, regions: &[Region]) -> Range<usize> {
        let first = self.poisoned.len();
        for shown in std::mem::take(&mut self.shown) {
            match regions.contains(&shown.region) {
                true => self.shown.push(shown),
                false => self.poisoned.push(shown.slot),
            }
        }
        first..self.poisoned.len()
    }
}

/// Shows a region of `target` at `gpa`, by KVM's slot number `slot`.
pub(super) fn show(
    vm: &Arc<VmFd>,
    target: &dyn TargetMemory,
    region: &Region,
    access: Access,
    slot: u32,
    gpa: u64,
) -> Result<Memslot, ShowError> {
    let file =
        target.file(region.file).ok_or(ShowError::File { gpa: region.gpa, file: region.file })?;
    let mapping = GuestMapping::of_file(file, region.offset, region.len, access)
        .map_err(|source| ShowError::Map { gpa: region.gpa, source })?;
    Memslot::add(vm, slot, gpa, mapping)
        .map_err(|source| ShowError::Slot { gpa: region.gpa, source })
}

/// Poison for one slot, made while the guest still runs.
pub(super) fn poison_for(slot: &Memslot, file: &PoisonFile) -> Result<GuestMapping, MappingError> {
    let access = slot.access().unwrap_or(Access::ReadOnly);
    // Writable poison takes many mappings, of which the process may have no more; then a guest's
    // writes are ignored.
    GuestMapping::poison(slot.len(), access, file)
        .or_else(|_| GuestMapping::poison(slot.len(), Access::ReadOnly, file))
}

/// Puts `poison` behind a slot while no vCPU runs, and returns what was there.
pub(super) fn replace(
    slot: &mut Memslot,
    poison: GuestMapping,
    file: &PoisonFile,
) -> Result<Option<GuestMapping>, TakeError> {
    match slot.replace(poison) {
        Ok(before) => Ok(before),
        Err(error @ SlotError::Delete { .. }) => {
            warn_limited!(
                error = &error as &dyn std::error::Error,
                "poison goes behind a slot that KVM keeps"
            );
            poison_in_place(slot, file).map(|()| None)
        }
        Err(error) => {
            warn_limited!(
                error = &error as &dyn std::error::Error,
                "a hole is left where a view has ended"
            );
            Ok(None)
        }
    }
}

/// Puts poison behind a slot while vCPUs may run.
pub(super) fn poison_in_place(slot: &mut Memslot, file: &PoisonFile) -> Result<(), TakeError> {
    let (number, gpa) = (slot.slot(), slot.gpa());
    slot.poison_in_place(file).map_err(|source| TakeError { slot: number, gpa, source })
}

/// Removes a slot from the guest. A slot that KVM does not delete keeps poison.
pub(super) fn delete(
    slot: &mut Memslot,
    file: &PoisonFile,
) -> Result<Option<GuestMapping>, TakeError> {
    slot.delete().or_else(|error| {
        warn_limited!(
            error = &error as &dyn std::error::Error,
            "a closed view's slot stays, with poison"
        );
        poison_in_place(slot, file).map(|()| None)
    })
}
