// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How many tools may be connected to the proxy.
//!
//! Each member of the group can connect; only a token opens a view. So a user has few slots for
//! tools without a view, and where all slots are taken the oldest tool that has not asked for a
//! view is evicted for a new one.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// The most tools at a time, and those of one user.
pub(super) const MAX_TOOLS: usize = 64;
pub(super) const MAX_OF_USER: usize = 32;

/// The most tools of one user that have no view.
pub(super) const MAX_WAITING_OF_USER: usize = 8;

/// How far a tool has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// It has not asked for a view.
    Idle,
    /// Its view is being opened.
    Asking,
    /// A token has opened its view.
    Open,
    /// It lost its slot to a new tool, and its connection ends.
    Evicted,
}

/// A slot that is taken.
#[derive(Debug)]
pub(super) struct ToolSlot {
    uid: u32,
    stage: Mutex<Stage>,
}

impl ToolSlot {
    pub(super) fn of(uid: u32) -> Self {
        Self { uid, stage: Mutex::new(Stage::Idle) }
    }

    /// Records how far its tool has come; `false` if the tool is evicted.
    pub(super) fn enter(&self, stage: Stage) -> bool {
        let mut now = self.lock();
        if *now != Stage::Evicted {
            *now = stage;
        }
        *now == stage
    }

    pub(super) fn is_evicted(&self) -> bool {
        *self.lock() == Stage::Evicted
    }

    fn lock(&self) -> MutexGuard<'_, Stage> {
        self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Looks for a slot for one more tool of a user beside those that are `taken`, oldest first.
///
/// # Errors
/// A message for the tool: which limit is reached, and what to do.
pub(super) fn find<'a>(
    mut taken: impl Iterator<Item = &'a ToolSlot> + Clone,
    uid: u32,
) -> Result<(), String> {
    let of_user = taken.clone().filter(|slot| slot.uid == uid);
    if of_user.clone().count() >= MAX_OF_USER {
        return Err(format!("user {uid} has {MAX_OF_USER} tools here already: end some"));
    }
    if of_user.filter(|slot| *slot.lock() != Stage::Open).count() >= MAX_WAITING_OF_USER {
        return Err(format!(
            "user {uid} has {MAX_WAITING_OF_USER} tools here already that have no view: end some"
        ));
    }
    if taken.clone().filter(|slot| !slot.is_evicted()).count() < MAX_TOOLS {
        return Ok(());
    }
    let evict = |slot: &ToolSlot| {
        let mut stage = slot.lock();
        let is_idle = *stage == Stage::Idle;
        if is_idle {
            *stage = Stage::Evicted;
        }
        is_idle
    };
    if taken.any(evict) {
        return Ok(());
    }
    Err(format!("{MAX_TOOLS} tools have views here: end some"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find_in(taken: &[ToolSlot], uid: u32) -> Result<(), String> {
        find(taken.iter(), uid)
    }

    /// So many slots of a user, at a stage.
    fn slots(uid: u32, stage: Stage, count: usize) -> Vec<ToolSlot> {
        (0..count).map(|_| ToolSlot { uid, stage: Mutex::new(stage) }).collect()
    }

    #[test]
    fn a_user_has_few_slots_without_a_view_and_more_with_one() {
        for stage in [Stage::Idle, Stage::Asking, Stage::Evicted] {
            let taken = slots(1, stage, MAX_WAITING_OF_USER);
            assert!(find_in(&taken, 1).unwrap_err().contains("no view"), "{stage:?}");
            assert_eq!(find_in(&taken, 2), Ok(()));
        }
        let mut taken = slots(1, Stage::Open, MAX_OF_USER - 1);
        assert_eq!(find_in(&taken, 1), Ok(()));
        taken.extend(slots(1, Stage::Open, 1));
        assert!(find_in(&taken, 1).is_err());
    }

    #[test]
    fn the_oldest_that_has_not_asked_is_evicted() {
        let mut taken: Vec<ToolSlot> =
            (1..=6).flat_map(|uid| slots(uid, Stage::Open, 10)).collect();
        taken.extend(slots(7, Stage::Asking, 1));
        taken.extend(slots(7, Stage::Idle, 3));
        let evicted = |taken: &[ToolSlot]| -> Vec<bool> {
            taken.iter().skip(60).take(4).map(ToolSlot::is_evicted).collect()
        };
        assert_eq!(find_in(&taken[..63], 8), Ok(()));
        assert_eq!(evicted(&taken), [false; 4]);
        assert_eq!(find_in(&taken, 8), Ok(()));
        assert_eq!(evicted(&taken), [false, true, false, false]);
        taken.extend(slots(8, Stage::Open, 1));
        assert!(!taken[61].enter(Stage::Asking) && taken[62].enter(Stage::Asking));
        assert_eq!(find_in(&taken, 8), Ok(()));
        taken.extend(slots(8, Stage::Open, 1));
        assert!(find_in(&taken, 8).is_err(), "all others have asked");
        assert_eq!(evicted(&taken), [false, true, false, true]);
    }

    #[test]
    fn evicted_tools_that_do_not_end_take_no_slot_of_others() {
        let users = 1..=8;
        let stuck = |uid| slots(uid, Stage::Evicted, MAX_WAITING_OF_USER);
        let mut taken: Vec<ToolSlot> = users.flat_map(stuck).collect();
        assert_eq!(find_in(&taken, 9), Ok(()));
        taken.extend((9..=10).flat_map(|uid| slots(uid, Stage::Open, MAX_OF_USER)));
        assert!(find_in(&taken, 11).is_err());
    }
}
