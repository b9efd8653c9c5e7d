// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Run of a target: from a start or a reset to the next one, with the same RAM. What was read in
//! two runs does not belong together: verbs that read for a while compare runs before they report
//! success.

use std::thread;
use std::time::Duration;

use anyhow::{Result, bail};
use kvmmem::view::{Range, State, Status, View};

/// How often, and after which time, a change is looked at again that is under way.
const TRIES: u32 = 1000;
const PAUSE: Duration = Duration::from_millis(1);

/// The run that a view showed at one moment.
pub(crate) struct TargetRun {
    /// The view's.
    generation: u64,
    /// The target's, where that is known ([`View::instance`]).
    instance: Option<u64>,
    ranges: Vec<Range>,
}

/// What has happened to the target since.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum RunChange {
    Nothing,
    /// RAM was added or removed, or is elsewhere in its files.
    Resized,
    /// It was reset, or more than one thing has happened.
    Reset,
}

impl TargetRun {
    /// The present one.
    pub(crate) fn of(view: &View) -> Result<Self> {
        // In this order: what happens in between counts as a change.
        let Status { generation, ranges, .. } = view.status()?;
        Ok(Self { generation, instance: view.instance()?, ranges })
    }

    /// As [`View::instance`].
    pub(crate) fn instance(&self) -> Option<u64> {
        self.instance
    }

    /// Whether the target was reset or its memory resized since.
    ///
    /// # Errors
    /// The view's, and where the view has ended and this is not known.
    pub(crate) fn has_ended(&self, view: &View) -> Result<bool> {
        Ok(self.change_of(view)? != RunChange::Nothing)
    }

    /// Whether the target was reset since: RAM that is added leaves the rest as it was.
    ///
    /// # Errors
    /// As [`TargetRun::has_ended`].
    pub(crate) fn was_reset(&self, view: &View) -> Result<bool> {
        Ok(self.change_of(view)? == RunChange::Reset)
    }

    fn change_of(&self, view: &View) -> Result<RunChange> {
        for _ in 0..TRIES {
            let (status, instance) = (view.status()?, view.instance()?);
            // The instance is a new one just before the view shows the change.
            let is_under_way = status.state == State::Open
                && status.generation == self.generation
                && instance != self.instance;
            if !is_under_way {
                return self.change(&status, instance);
            }
            thread::sleep(PAUSE);
        }
        Ok(RunChange::Reset)
    }

    fn change(&self, now: &Status, instance: Option<u64>) -> Result<RunChange> {
        // The end of a view counts as one of its changes, and takes its ranges.
        let is_open = now.state == State::Open;
        let is_same_view = !is_open || now.generation == self.generation;
        Ok(match self.instance.zip(instance) {
            Some((before, now)) if before == now && is_same_view => RunChange::Nothing,
            Some((before, now)) if before == now => RunChange::Resized,
            // A reset leaves RAM where it is, and each change counts one up.
            Some((before, next))
                if is_open && before.checked_add(1) == Some(next) && now.ranges != self.ranges =>
            {
                RunChange::Resized
            }
            Some(_) => RunChange::Reset,
            None if !is_open => {
                bail!("the view has ended, and whether the target was reset before is not known")
            }
            None if is_same_view => RunChange::Nothing,
            None => RunChange::Reset,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reset_is_told_from_ram_that_was_added_and_from_the_end_of_the_view() {
        use State::{Gone, Open, Revoked};
        let range = |len| vec![Range { gpa: 0, len }];
        let small = range(0x1000);
        let before = |instance| TargetRun { generation: 8, instance, ranges: small.clone() };
        let after = |instance: Option<u64>, generation, state, ranges: &[Range], now| {
            let status = Status {
                generation,
                state,
                is_writable: false,
                uuid: [0; 16],
                ranges: ranges.to_vec(),
            };
            before(instance).change(&status, now).ok()
        };
        let (nothing, resized, reset) =
            (Some(RunChange::Nothing), Some(RunChange::Resized), Some(RunChange::Reset));
        let (old, next) = (Some(5), Some(6));
        assert_eq!(after(old, 8, Open, &small, old), nothing);
        assert_eq!(after(old, 9, Open, &small, next), reset);
        assert_eq!(after(old, 9, Open, &range(0x2000), next), resized);
        // Two changes, one of which may be a reset.
        assert_eq!(after(old, 10, Open, &range(0x2000), Some(7)), reset);
        // The same RAM elsewhere.
        assert_eq!(after(old, 9, Open, &small, old), resized);
        for ended in [Revoked, Gone] {
            assert_eq!(after(old, 9, ended, &[], old), nothing);
            assert_eq!(after(old, 10, ended, &[], next), reset);
            assert_eq!(after(None, 9, ended, &[], None), None);
        }
        // A host that does not report the instance.
        assert_eq!(after(None, 8, Open, &small, None), nothing);
        assert_eq!(after(None, 9, Open, &small, None), reset);
    }
}
