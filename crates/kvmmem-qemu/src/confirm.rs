// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds out which mapping of a VMM is which part of the RAM, where the VMM cannot be asked: by
//! their sizes, and by what the guest's firmware has left in them. What can be told apart by
//! neither is refused.

use kvmmem_proto::map::Region;

use super::acpi::{self, AcpiError};
use super::backing::{self, Backing};
use super::boot_map::{self, BootMapError};
use super::guest::{Guest, Window};
use super::layout::Layout;
use super::mapping::Mapping;
use super::obstacle::Obstacle;
use super::process::Process;

/// The most ways to choose mappings that are tried.
const MAX_CHOICES: usize = 32;

/// Where the RAM above the hole begins.
const FOUR_GIB: u64 = 1 << 32;

/// Why no choice of mappings is confirmed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfirmError {
    /// No choice fits, or several fit equally well.
    #[error(transparent)]
    Obstacle(#[from] Obstacle),
    /// The guest confirms none.
    #[error(transparent)]
    Unconfirmed(EvidenceError),
}

/// Why the guest's memory does not confirm a layout.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EvidenceError {
    /// Its firmware's tables are not where they should be.
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    /// The memory map that it was started with is not found, or another one.
    #[error(transparent)]
    BootMap(#[from] BootMapError),
}

/// What a layout is confirmed by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// The tables of a firmware.
    Acpi,
    /// The memory map of a VMM that starts kernels without a firmware.
    BootMap,
}

/// A mapping that may be taken for a backend.
struct Candidate {
    backing: Backing,
    window: Window,
}

/// The one of the layouts that the guest confirms, and the mappings that are its backends.
pub(crate) fn choose_layout(
    process: &Process,
    mappings: &[Mapping],
    layouts: Vec<Layout>,
    by: By,
) -> Result<(Layout, Vec<Backing>), ConfirmError> {
    let mut refused = None;
    for layout in layouts {
        match choose(process, mappings, &layout, by) {
            Ok(backings) => return Ok((layout, backings)),
            // That memory of a layout is there says more than that memory of another one is not.
            Err(error) => match (&refused, &error) {
                (Some(_), ConfirmError::Obstacle(Obstacle::NotFound(_))) => {}
                _ => refused = Some(error),
            },
        }
    }
    Err(refused
        .unwrap_or(ConfirmError::Unconfirmed(EvidenceError::BootMap(BootMapError::NotFound))))
}

/// The mappings that are the layout's backends.
fn choose(
    process: &Process,
    mappings: &[Mapping],
    layout: &Layout,
    by: By,
) -> Result<Vec<Backing>, ConfirmError> {
    let mut sizes = layout.sizes.clone();
    sizes.sort_unstable();
    sizes.dedup();
    let mut candidates = Vec::new();
    for size in sizes {
        let found = backing::candidates(mappings, size, &layout.sizes);
        let needed = layout.sizes.iter().filter(|other| **other == size).count();
        if found.len() < needed {
            return Err(Obstacle::NotFound(size).into());
        }
        // As many as may be chosen in too many ways are not even opened.
        for backing in found.into_iter().take(MAX_CHOICES + 1) {
            let window = Window::open(process, &backing)?;
            candidates.push(Candidate { backing, window });
        }
    }
    let (low, high): (Vec<&Region>, Vec<&Region>) =
        layout.regions.iter().partition(|region| region.gpa < FOUR_GIB);
    let low_end = low.iter().map(|region| region.gpa + region.len).max().unwrap_or(0);
    let high = high.iter().map(|region| region.len).sum();
    let verify = |choice: &[usize]| {
        let chosen = choice.iter().filter_map(|number| candidates.get(*number));
        let guest = Guest::new(layout, chosen.map(|candidate| candidate.window.clone()).collect());
        let read = |gpa, bytes: &mut [u8]| guest.read(gpa, bytes);
        match by {
            By::Acpi => acpi::verify(read, low_end).map(|_| ()).map_err(EvidenceError::Acpi),
            By::BootMap => boot_map::verify(read, low_end, high).map_err(EvidenceError::BootMap),
        }
    };
    let sizes: Vec<u64> = candidates.iter().map(|candidate| candidate.backing.len).collect();
    let overlap = |one: usize, other: usize| match (candidates.get(one), candidates.get(other)) {
        (Some(one), Some(other)) => one.backing.overlaps(&other.backing),
        _ => true,
    };
    let choice = only(&layout.sizes, &sizes, overlap, verify)?;
    let chosen =
        choice.into_iter().filter_map(|number| Some(candidates.get(number)?.backing.clone()));
    Ok(chosen.collect())
}

/// The one way to choose from candidates of these sizes that is confirmed; no two of it may
/// `overlap`.
fn only(
    needed: &[u64],
    sizes: &[u64],
    overlap: impl Fn(usize, usize) -> bool,
    verify: impl Fn(&[usize]) -> Result<(), EvidenceError>,
) -> Result<Vec<usize>, ConfirmError> {
    let choices = choices(needed, sizes, overlap)
        .ok_or_else(|| Obstacle::Ambiguous(*needed.first().unwrap_or(&0)))?;
    let mut refused = EvidenceError::BootMap(BootMapError::NotFound);
    let confirmed =
        choices.iter().find(|choice| verify(choice).map_err(|error| refused = error).is_ok());
    let confirmed = confirmed.ok_or(ConfirmError::Unconfirmed(refused))?;
    // Those before it as well: the guest may have left what confirms them only after they were
    // tried.
    match choices.iter().find(|choice| *choice != confirmed && verify(choice).is_ok()) {
        None => Ok(confirmed.clone()),
        Some(other) => {
            let pairs = confirmed.iter().zip(other).zip(needed);
            let size = pairs.filter(|((one, other), _)| one != other).map(|(_, size)| *size).next();
            Err(Obstacle::Ambiguous(size.unwrap_or(0)).into())
        }
    }
}

/// All ways to choose a candidate of the right size for each that is needed, none twice and none
/// that overlap; `None` where there are too many.
fn choices(
    needed: &[u64],
    sizes: &[u64],
    overlap: impl Fn(usize, usize) -> bool,
) -> Option<Vec<Vec<usize>>> {
    let mut choices: Vec<Vec<usize>> = vec![Vec::new()];
    for size in needed {
        let fitting = |choice: &Vec<usize>| {
            let is_taken = |number: usize| {
                choice.iter().any(|other| *other == number || overlap(*other, number))
            };
            let free = |number: &usize| sizes.get(*number) == Some(size) && !is_taken(*number);
            let extend = |number| choice.iter().copied().chain([number]).collect();
            (0..sizes.len()).filter(free).map(extend).collect::<Vec<Vec<usize>>>()
        };
        choices = choices.iter().flat_map(fitting).collect();
        if choices.len() > MAX_CHOICES {
            return None;
        }
    }
    Some(choices)
}

#[cfg(test)]
mod tests {
    use super::*;

    const APART: fn(usize, usize) -> bool = |_, _| false;
    const FAILED: Result<(), EvidenceError> =
        Err(EvidenceError::Acpi(AcpiError::NotFound { low_end: 1 }));

    #[test]
    fn the_confirmed_choice_is_taken() {
        let verify = |choice: &[usize]| if choice == [1, 2, 0] { Ok(()) } else { FAILED };
        assert_eq!(only(&[4, 2, 4], &[4, 4, 2, 8], APART, verify).unwrap(), [1, 2, 0]);
        let none = only(&[4, 2, 4], &[4, 4, 2, 8], APART, |_| FAILED);
        assert!(matches!(none, Err(ConfirmError::Unconfirmed(error)) if Err(error) == FAILED));
    }

    #[test]
    fn what_was_tried_too_early_is_tried_again() {
        let tries = std::cell::Cell::new(0);
        // The firmware runs while the last choice is looked at.
        let verify = |_: &[usize]| {
            tries.set(tries.get() + 1);
            if tries.get() < 2 { FAILED } else { Ok(()) }
        };
        let ambiguous = only(&[4, 4], &[4, 4], APART, verify);
        assert!(matches!(ambiguous, Err(ConfirmError::Obstacle(Obstacle::Ambiguous(4)))));
    }

    #[test]
    fn what_is_as_good_as_another_is_refused() {
        // The first node is told by its content, the others are not.
        let verify = |choice: &[usize]| if choice.first() == Some(&0) { Ok(()) } else { FAILED };
        assert_eq!(only(&[4, 4], &[4, 4], APART, verify).unwrap(), [0, 1]);
        assert!(matches!(
            only(&[4, 4, 4], &[4, 4, 4], APART, verify),
            Err(ConfirmError::Obstacle(Obstacle::Ambiguous(4)))
        ));
        assert!(matches!(
            only(&[4, 4], &[4, 4, 4], APART, verify),
            Err(ConfirmError::Obstacle(Obstacle::Ambiguous(4)))
        ));
        assert!(matches!(
            only(&[4], &[4; 33], APART, verify),
            Err(ConfirmError::Obstacle(Obstacle::Ambiguous(4)))
        ));
        assert_eq!(choices(&[4; 5], &[4; 5], APART), None);
        // Of parts of one mapping in two orders, those of the same order go together.
        let overlap =
            |one, other| [(0, 2), (2, 0), (1, 3), (3, 1), (0, 1), (2, 3)].contains(&(one, other));
        assert_eq!(choices(&[4, 2], &[4, 4, 2, 2], overlap), Some(vec![vec![0, 3], vec![1, 2]]));
    }
}
