// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a peer is to be told, in the order in which the core decided it.
//!
//! Pushes are put in while the core's lock is held, which takes memory and no system call. They are
//! sent by the same thread once it is released: [`Outbox::sending`] serializes that and keeps their
//! order. Its lock is taken before the core's, never while that is held.

use std::collections::VecDeque;
use std::sync::Arc;

use crate::core::effect::Push;
use crate::ram::Ram;
use crate::sync::checked::{Mutex, MutexGuard, lock};

/// The most pushes that wait. A peer with more of them does not read.
const MAX: usize = 16 * 1024;

/// A push, and the RAM whose files go with it.
pub(crate) type Packet = (Push, Option<Arc<Ram>>);

/// Held while pushes are sent.
pub(crate) type Sending<'a> = MutexGuard<'a, ()>;

/// The pushes that wait to be sent.
#[derive(Debug, Default)]
pub(crate) struct Outbox {
    waiting: Mutex<Waiting>,
    sending: Mutex<()>,
}

#[derive(Debug, Default)]
struct Waiting {
    packets: VecDeque<Packet>,
    has_overflowed: bool,
}

/// What is at the head of the queue.
#[derive(Debug)]
pub(crate) enum QueueHead {
    Packet(Packet),
    /// There were too many.
    Overflow,
}

impl Outbox {
    /// Adds a push. To be called with the core's lock held.
    pub(crate) fn put(&self, packet: Packet) {
        let mut waiting = self.lock();
        if waiting.packets.len() < MAX {
            waiting.packets.push_back(packet);
        } else {
            waiting.has_overflowed = true;
        }
    }

    /// Keeps others from sending.
    pub(crate) fn sending(&self) -> Sending<'_> {
        lock(&self.sending)
    }

    /// Takes the next push out; its caller holds [`Self::sending`].
    pub(crate) fn take(&self, _sending: &Sending<'_>) -> Option<QueueHead> {
        let mut waiting = self.lock();
        if waiting.has_overflowed {
            return Some(QueueHead::Overflow);
        }
        waiting.packets.pop_front().map(QueueHead::Packet)
    }

    /// Drops what waits.
    pub(crate) fn clear(&self) {
        let packets = std::mem::take(&mut self.lock().packets);
        drop(packets);
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        lock(&self.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn revoke(grant: u64) -> Packet {
        (Push::Revoke { grant }, None)
    }

    #[test]
    fn pushes_are_sent_in_the_order_in_which_they_were_decided() {
        const EACH: u64 = 500;
        let (outbox, core, sent) = (Outbox::default(), Mutex::new(0), Mutex::new(Vec::new()));
        let decide = || {
            let mut last = core.lock().unwrap();
            *last += 1;
            outbox.put(revoke(*last));
        };
        let flush = || {
            let sending = outbox.sending();
            while let Some(QueueHead::Packet((Push::Revoke { grant }, _))) = outbox.take(&sending) {
                sent.lock().unwrap().push(grant);
            }
        };
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..EACH {
                        decide();
                        flush();
                    }
                });
            }
        });
        assert_eq!(sent.into_inner().unwrap(), (1..=4 * EACH).collect::<Vec<_>>());
    }

    #[test]
    fn a_peer_that_does_not_read_costs_no_more_than_so_much() {
        let outbox = Outbox::default();
        (0..2 * MAX as u64).for_each(|grant| outbox.put(revoke(grant)));
        assert_eq!(outbox.lock().packets.len(), MAX);
        assert!(matches!(outbox.take(&outbox.sending()), Some(QueueHead::Overflow)));
    }
}
