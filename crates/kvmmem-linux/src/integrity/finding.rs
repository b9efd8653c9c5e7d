// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What checks find.

use crate::kernel::Kernel;
use crate::modules::Module;

/// What a check has looked at, and found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// How many entries, modules or tasks there are.
    pub examined: usize,
    /// What is not as it should be.
    pub findings: Vec<Finding>,
}

/// Something that is not as it should be.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Finding {
    /// An entry leads where it should not.
    Hook {
        /// The entry, for example `system call 0`.
        entry: String,
        /// Where it is; a register is nowhere.
        gva: Option<u64>,
        /// Where it leads.
        target: u64,
        /// What is there.
        place: Place,
    },
    /// A module or task is not where it should be as well.
    Hidden {
        /// What it is called, for example `module dummy`; control characters may be there.
        name: String,
        /// Where its structure is.
        gva: u64,
        /// Where it was found.
        found: &'static str,
        /// Where it was not.
        missing: &'static str,
    },
}

/// What is at an address.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Place {
    /// The kernel's text: the nearest symbol at or below it, and how far from it.
    Text {
        /// The symbol.
        symbol: String,
        /// Bytes from it.
        offset: u64,
    },
    /// A module's memory.
    Module(String),
    /// Neither.
    Elsewhere,
}

impl Place {
    /// What is at an address of a kernel that has these modules.
    pub(super) fn of(kernel: &Kernel<'_>, modules: &[Module], gva: u64) -> Self {
        let text = || {
            let symbols = kernel.symbols().ok()?;
            (symbols.get("_stext")?..symbols.get("_etext")?)
                .contains(&gva)
                .then(|| symbols.nearest(gva))?
        };
        if let Some(symbol) = text() {
            return Self::Text { offset: gva - symbol.address, symbol: symbol.name };
        }
        let has = |module: &&Module| {
            module.parts.iter().any(|(base, size)| gva.wrapping_sub(*base) < *size)
        };
        modules.iter().find(has).map_or(Self::Elsewhere, |module| Self::Module(module.name.clone()))
    }
}
