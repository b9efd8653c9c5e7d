// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How many lines of the audit log each party may cause, for each kind of event.
//!
//! A party is a VM (all that its guest, VMM or tool causes), a process of the host that holds a
//! token, or a user of the host for all else. Each has a limit of its own, so that the noise of one
//! hides no line of another. The first line of a new party takes from what its user's new parties
//! have together: connecting again and again, or making many grants, gives a user no more lines in
//! the long run. What is remembered of parties is bounded.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, Instant};

use kvmmem_limit::{Bucket, Rate};

use super::kind::Kind;
use crate::sync::lock;

/// Lines a second of a party for each kind of event.
const PER_SECOND: u32 = 50;

/// The same for what operators do.
const OPERATORS_PER_SECOND: u32 = 1000;

/// The first lines of a user's new parties. At once, since all VMs register again when the broker
/// starts anew.
const NEW_PARTIES: Rate = Rate { burst: 4096, per_second: PER_SECOND };

/// The most parties that are remembered, times the kinds of events that they have caused of late.
const MAX_BUCKETS: usize = 16_384;

/// How often those are looked for that need not be remembered.
const SWEEP: Duration = Duration::from_secs(1);

/// The limits of what one VM causes: of the few kinds of events that it has caused so far.
#[derive(Debug, Default)]
pub(crate) struct Limits(Mutex<Vec<(Kind, Bucket)>>);

/// Who causes a line.
#[derive(Clone, Copy, Debug)]
pub(super) enum Party<'a> {
    /// A VM: the limits of its VMM's connection, and that one's user.
    Vm(&'a Limits, u32),
    /// A process of the host that uses a token.
    Holder { uid: u32, grant: u64 },
    /// A user of the host.
    User(u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Key {
    Holder {
        uid: u32,
        grant: u64,
    },
    User(u32),
    /// The first lines of a user's parties.
    New(u32),
    /// All parties that do not fit in the table.
    Rest,
}

/// The limits of all parties.
#[derive(Debug, Default)]
pub(super) struct Parties(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    buckets: HashMap<(Key, Kind), Bucket>,
    swept: Option<Instant>,
}

impl Parties {
    /// Whether a line may be written, and how many of its kind were not before it.
    pub(super) fn allow(&self, party: Party<'_>, event: Kind, now: Instant) -> Option<u64> {
        match party {
            Party::Vm(limits, uid) => {
                let (mut buckets, rate) = (lock(&limits.0), Rate::of(PER_SECOND));
                if let Some((_, bucket)) = buckets.iter_mut().find(|(kind, _)| *kind == event) {
                    return bucket.allow(rate, now);
                }
                let suppressed = self.lock().allow((Key::New(uid), event), now)?;
                let mut bucket = Bucket::new(rate, now);
                let allowed = bucket.allow(rate, now);
                buckets.push((event, bucket));
                allowed.map(|own| own + suppressed)
            }
            Party::Holder { uid, grant } => {
                let (mut state, key) = (self.lock(), (Key::Holder { uid, grant }, event));
                if state.buckets.contains_key(&key) {
                    return state.allow(key, now);
                }
                let suppressed = state.allow((Key::New(uid), event), now)?;
                state.allow(key, now).map(|own| own + suppressed)
            }
            Party::User(uid) => self.lock().allow((Key::User(uid), event), now),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.0)
    }
}

impl State {
    fn allow(&mut self, key: (Key, Kind), now: Instant) -> Option<u64> {
        self.make_room(&key, now);
        // The bucket of the rest has a place of its own.
        let is_full = self.buckets.len() >= MAX_BUCKETS && !self.buckets.contains_key(&key);
        let key = if is_full { (Key::Rest, key.1) } else { key };
        let rate = rate(key);
        self.buckets.entry(key).or_insert_with(|| Bucket::new(rate, now)).allow(rate, now)
    }

    /// Forgets quiet parties if the table is full.
    fn make_room(&mut self, key: &(Key, Kind), now: Instant) {
        let is_due = |swept: Instant| now.saturating_duration_since(swept) >= SWEEP;
        if self.buckets.len() < MAX_BUCKETS
            || self.buckets.contains_key(key)
            || !self.swept.is_none_or(is_due)
        {
            return;
        }
        self.swept = Some(now);
        let mut suppressed: HashMap<Kind, u64> = HashMap::new();
        self.buckets.retain(|(kind, event), bucket| {
            let is_kept = *kind == Key::Rest || !bucket.is_full(rate((*kind, *event)), now);
            if !is_kept && bucket.suppressed() > 0 {
                *suppressed.entry(*event).or_default() += bucket.suppressed();
            }
            is_kept
        });
        for (event, lines) in suppressed {
            let rest = (Key::Rest, event);
            self.buckets
                .entry(rest)
                .or_insert_with(|| Bucket::new(rate(rest), now))
                .suppress(lines);
        }
    }
}

fn rate((key, event): (Key, Kind)) -> Rate {
    match (key, event) {
        (Key::New(_), _) => NEW_PARTIES,
        (
            Key::User(_),
            Kind::Added
            | Kind::AddedIntrospector
            | Kind::Hook
            | Kind::Granted
            | Kind::Revoked
            | Kind::Policy,
        ) => Rate::of(OPERATORS_PER_SECOND),
        _ => Rate::of(PER_SECOND),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn count(parties: &Parties, party: Party<'_>, event: Kind, now: Instant) -> usize {
        (0..10_000).filter(|_| parties.allow(party, event, now).is_some()).count()
    }

    #[test]
    fn the_noise_of_one_hides_no_line_of_another() {
        let (parties, now) = (Parties::default(), Instant::now());
        let (one, other) = (Limits::default(), Limits::default());
        assert_eq!(count(&parties, Party::Vm(&one, 1), Kind::Refused, now), 50);
        assert!(parties.allow(Party::Vm(&other, 1), Kind::Refused, now).is_some());
        assert!(parties.allow(Party::Vm(&one, 1), Kind::Used, now).is_some());
        let holder = |uid, grant| Party::Holder { uid, grant };
        assert_eq!(count(&parties, holder(1, 7), Kind::Attached, now), 50);
        assert!(parties.allow(holder(1, 8), Kind::Attached, now).is_some());
        assert!(parties.allow(holder(2, 7), Kind::Attached, now).is_some());
        assert_eq!(count(&parties, Party::User(1), Kind::Refused, now), 50);
        assert_eq!(count(&parties, Party::User(2), Kind::Granted, now), 1000);
        // How many were left out is told.
        let later = now + Duration::from_secs(1);
        assert_eq!(parties.allow(holder(1, 7), Kind::Attached, later), Some(10_000 - 50));
        assert_eq!(parties.allow(Party::Vm(&one, 1), Kind::Refused, later), Some(10_000 - 50));
    }

    #[test]
    fn all_vms_may_register_at_once_and_whoever_does_so_again_and_again_may_not() {
        let (parties, now) = (Parties::default(), Instant::now());
        for _ in 0..2048 {
            assert_eq!(
                parties.allow(Party::Vm(&Limits::default(), 1), Kind::Registered, now),
                Some(0)
            );
        }
        let again = |at| {
            (0..10_000)
                .filter(|_| {
                    parties.allow(Party::Vm(&Limits::default(), 1), Kind::Registered, at).is_some()
                })
                .count()
        };
        assert_eq!(again(now), 2048);
        assert_eq!(again(now + Duration::from_secs(1)), 50);
        // What another user's VMs cause is written.
        assert!(parties.allow(Party::Vm(&Limits::default(), 2), Kind::Registered, now).is_some());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let (parties, mut now) = (Parties::default(), Instant::now());
        for round in 0..3 {
            for number in 0..20_000 {
                let uid = round * 20_000 + number;
                parties.allow(Party::User(uid), Kind::Refused, now);
                parties.allow(Party::Holder { uid, grant: 1 }, Kind::Attached, now);
            }
            let buckets = parties.lock().buckets.len();
            assert!(buckets <= MAX_BUCKETS + Kind::COUNT, "{buckets}");
            now += Duration::from_secs(2);
        }
        // Those who were quiet have made room.
        assert_eq!(count(&parties, Party::User(u32::MAX - 1), Kind::Refused, now), 50);
        assert_eq!(count(&parties, Party::User(u32::MAX - 2), Kind::Refused, now), 50);
    }
}
