// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The page tables in which a verb looks up guest-virtual addresses, and what helps where a walk
//! through them ends early.

use std::error::Error;

use clap::ValueEnum;
use kvmmem::paging::{AddressSpace, Levels, WalkError};

use crate::memory::Memory;

/// Levels of page tables, on the command line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Depth {
    /// 48-bit addresses
    #[value(name = "4")]
    Four,
    /// 57-bit addresses, where CR4.LA57 is set
    #[value(name = "5")]
    Five,
}

impl From<Depth> for Levels {
    fn from(depth: Depth) -> Self {
        match depth {
            Depth::Four => Self::Four,
            Depth::Five => Self::Five,
        }
    }
}

/// The address space that a verb looks up addresses in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tables {
    pub(crate) space: AddressSpace,
    levels_from: LevelsFrom,
}

/// Where the number of levels comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum LevelsFrom {
    /// CR4 of a vCPU.
    Vcpu,
    /// The command line, the tables, or an address.
    Evidence,
    /// Nothing: four are assumed.
    Nothing,
}

impl Tables {
    /// Finds out how many levels the tables have, unless the command line has the number.
    pub(crate) fn new(cr3: u64, given: Option<Depth>, gvas: &[u64], memory: &mut Memory) -> Self {
        let given = given.map(Levels::from);
        let detected = Levels::detect(cr3, |gpa, buf| memory.read(gpa, buf));
        if let (Some(given), Some(detected)) = (given, detected)
            && given != detected
        {
            let (given, detected) = (given.count(), detected.count());
            tracing::warn!(
                "the page tables at {cr3:#x} look as if they had {detected} levels; they are read with --levels {given}"
            );
        }
        let needs_five =
            |gva: &u64| !Levels::Four.is_canonical(*gva) && Levels::Five.is_canonical(*gva);
        let by_address = gvas.iter().any(needs_five).then_some(Levels::Five);
        let levels = given.or(detected).or(by_address);
        let space = AddressSpace { cr3, levels: levels.unwrap_or(Levels::Four) };
        let levels_from = if levels.is_some() { LevelsFrom::Evidence } else { LevelsFrom::Nothing };
        Self { space, levels_from }
    }

    /// The tables of a vCPU, whose CR4 gives the number of levels.
    pub(crate) fn of_vcpu(space: AddressSpace) -> Self {
        Self { space, levels_from: LevelsFrom::Vcpu }
    }

    /// Reads as much as can be from a guest-virtual address on; returns how many bytes that is, and
    /// why there are not more.
    pub(crate) fn read<E: Error + Send + Sync + 'static>(
        &self,
        gva: u64,
        buf: &mut [u8],
        read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> (usize, Option<anyhow::Error>) {
        let Err(error) = self.space.read(gva, buf, read) else { return (buf.len(), None) };
        let count = usize::try_from(error.gva().wrapping_sub(gva)).unwrap_or(0);
        let remedy = self.remedy(&error);
        (count, Some(with_remedy(error.gva(), error, remedy)))
    }

    /// A remedy for a walk that ends early; may be empty.
    pub(crate) fn remedy<E: Error>(&self, error: &WalkError<E>) -> &'static str {
        match error {
            WalkError::NotCanonical { gva, levels: Levels::Four }
                if Levels::Five.is_canonical(*gva) && self.levels_from != LevelsFrom::Vcpu =>
            {
                "; if the target uses 5 levels, give --levels 5"
            }
            WalkError::NotPresent { .. } | WalkError::Reserved { .. } | WalkError::Table { .. }
                if self.levels_from == LevelsFrom::Nothing =>
            {
                "; the tables do not show how many levels they have, and 4 were assumed: try --levels 5"
            }
            _ => "",
        }
    }
}

/// An error at a guest-virtual address, with what helps.
pub(crate) fn with_remedy(
    gva: u64,
    error: impl Error + Send + Sync + 'static,
    remedy: &str,
) -> anyhow::Error {
    let error = anyhow::Error::new(error);
    if remedy.is_empty() {
        error
    } else {
        error.context(format!("cannot read gva {gva:#x}{remedy}"))
    }
}
