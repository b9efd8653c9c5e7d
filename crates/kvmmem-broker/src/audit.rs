// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The audit log: who got, used and lost what, as `tracing` events of target [`TARGET`] and as
//! lines of a file.
//!
//! What a guest, a tool or a user can cause at will is limited to so many lines a second for each
//! kind of event and each party (`limits`); the field `suppressed` of the next line tells how
//! many were left out. Tokens are never written.

mod event;
mod file;
mod kind;
pub(crate) mod limits;
mod movable;
mod record;

use std::sync::{PoisonError, RwLock};
use std::time::Instant;

pub(crate) use event::Event;
use file::Lines;
use limits::Parties;
pub(crate) use movable::AuditFile;
use record::Record;
pub use record::TARGET;

/// The audit log.
#[derive(Debug, Default)]
pub(crate) struct Audit {
    file: RwLock<Option<Lines>>,
    parties: Parties,
}

impl Audit {
    /// Also writes lines to `file` from now on: one JSON object each, with `time` in UTC by RFC
    /// 3339, `event` and what belongs to it. A failure is logged once, and later lines are tried.
    pub(crate) fn write_to(&self, file: AuditFile) -> std::io::Result<()> {
        let lines = Lines::new(file)?;
        *self.file.write().unwrap_or_else(PoisonError::into_inner) = Some(lines);
        Ok(())
    }

    /// Writes an event, unless its party has caused too many of its kind of late.
    pub(crate) fn write(&self, event: Event<'_>) {
        let allowed = self.parties.allow(event.party(), event.kind(), Instant::now());
        let Some(suppressed) = allowed else { return };
        let mut record = Record { suppressed, ..Record::default() };
        event.fill(&mut record);
        record.trace();
        if let Some(file) = &*self.file.read().unwrap_or_else(PoisonError::into_inner) {
            file.write(&record);
        }
    }
}
