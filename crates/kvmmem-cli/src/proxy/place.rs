// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A tool's place among those that may be connected to the proxy.
//!
//! Each member of the group can connect; only a token opens a view. So a user has few places for
//! tools without a view, and where all places are taken the oldest tool that has not asked for a view
//! is evicted for a new one.

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
    /// It lost its place to a new tool, and its connection ends.
    Evicted,
}

/// A place that is taken.
#[derive(Debug)]
pub(super) struct Place {
    uid: u32,
    stage: Mutex<Stage>,
}

impl Place {
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

/// Looks for a place for one more tool of a user beside those that are `taken`, oldest first.
///
/// # Errors
/// A message for the tool: which limit is reached, and what to do.
pub(super) fn find<'a>(
    mut taken: impl Iterator<Item = &'a Place> + Clone,
    uid: u32,
) -> Result<(), String> {
    let of_user = taken.clone().filter(|place| place.uid == uid);
    if of_user.clone().count() >= MAX_OF_USER {
        return Err(format!("user {uid} has {MAX_OF_USER} tools here already: end some"));
    }
    if of_user.filter(|place| *place.lock() != Stage::Open).count() >= MAX_WAITING_OF_USER {
        return Err(format!(
            "user {uid} has {MAX_WAITING_OF_USER} tools here already that have no view: end some"
        ));
    }
    if taken.clone().filter(|place| !place.is_evicted()).count() < MAX_TOOLS {
        return Ok(());
    }
    let evict = |place: &Place| {
        let mut stage = place.lock();
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

    fn find_in(taken: &[Place], uid: u32) -> Result<(), String> {
        find(taken.iter(), uid)
    }

    /// So many places of a user, at a stage.
    fn places(uid: u32, stage: Stage, count: usize) -> Vec<Place> {
        (0..count).map(|_| Place { uid, stage: Mutex::new(stage) }).collect()
    }

    #[test]
    fn a_user_has_few_places_without_a_view_and_more_with_one() {
        for stage in [Stage::Idle, Stage::Asking, Stage::Evicted] {
            let taken = places(1, stage, MAX_WAITING_OF_USER);
            assert!(find_in(&taken, 1).unwrap_err().contains("no view"), "{stage:?}");
            assert_eq!(find_in(&taken, 2), Ok(()));
        }
        let mut taken = places(1, Stage::Open, MAX_OF_USER - 1);
        assert_eq!(find_in(&taken, 1), Ok(()));
        taken.extend(places(1, Stage::Open, 1));
        assert!(find_in(&taken, 1).is_err());
    }

    #[test]
    fn the_oldest_that_has_not_asked_is_evicted() {
        let mut taken: Vec<Place> = (1..=6).flat_map(|uid| places(uid, Stage::Open, 10)).collect();
        taken.extend(places(7, Stage::Asking, 1));
        taken.extend(places(7, Stage::Idle, 3));
        let evicted = |taken: &[Place]| -> Vec<bool> {
            taken.iter().skip(60).take(4).map(Place::is_evicted).collect()
        };
        assert_eq!(find_in(&taken[..63], 8), Ok(()));
        assert_eq!(evicted(&taken), [false; 4]);
        assert_eq!(find_in(&taken, 8), Ok(()));
        assert_eq!(evicted(&taken), [false, true, false, false]);
        taken.extend(places(8, Stage::Open, 1));
        assert!(!taken[61].enter(Stage::Asking) && taken[62].enter(Stage::Asking));
        assert_eq!(find_in(&taken, 8), Ok(()));
        taken.extend(places(8, Stage::Open, 1));
        assert!(find_in(&taken, 8).is_err(), "all others have asked");
        assert_eq!(evicted(&taken), [false, true, false, true]);
    }

    #[test]
    fn evicted_tools_that_do_not_end_take_no_place_of_others() {
        let users = 1..=8;
        let stuck = |uid| places(uid, Stage::Evicted, MAX_WAITING_OF_USER);
        let mut taken: Vec<Place> = users.flat_map(stuck).collect();
        assert_eq!(find_in(&taken, 9), Ok(()));
        taken.extend((9..=10).flat_map(|uid| places(uid, Stage::Open, MAX_OF_USER)));
        assert!(find_in(&taken, 11).is_err());
    }
}
