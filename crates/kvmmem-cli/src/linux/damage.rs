// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a verb about a guest could not print.

/// What a verb could not print.
#[derive(Default)]
pub(crate) struct Damage {
    pub(super) missing: Vec<String>,
    pub(super) marked: usize,
}

impl Damage {
    /// Whether there is something.
    pub(crate) fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.marked == 0
    }

    /// Adds things that are missing.
    pub(crate) fn missing(&mut self, count: usize, one: &str, many: &str) {
        if count > 0 {
            self.missing.push(format!("at least {count} {}", if count == 1 { one } else { many }));
        }
    }

    /// Adds something that is missing.
    pub(crate) fn add(&mut self, what: String) {
        self.missing.push(what);
    }

    /// Adds rows that are marked.
    pub(crate) fn marked(&mut self, rows: impl IntoIterator<Item = bool>) {
        self.marked += rows.into_iter().filter(|is_damaged| *is_damaged).count();
    }
}
