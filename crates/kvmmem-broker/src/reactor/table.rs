// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a reactor waits for: registrations in slots, and their deadlines.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

/// A registration. The upper half is the slot's generation, the lower half the slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Token(pub(super) u64);

/// Registrations with handlers of type `H`.
pub(super) struct Table<H> {
    slots: Vec<Slot<H>>,
    /// Slots without a registration.
    free: Vec<u32>,
    pub(super) deadlines: BTreeSet<(Instant, Token)>,
    /// The thread waits, or is about to.
    pub(super) is_waiting: bool,
    pub(super) is_ended: bool,
}

struct Slot<H> {
    generation: u32,
    registration: Option<Registration<H>>,
}

pub(super) struct Registration<H> {
    pub(super) handler: H,
    /// In the epoll set; kept open as long as it is.
    pub(super) fd: Option<Arc<OwnedFd>>,
    pub(super) deadline: Option<Instant>,
    pub(super) is_armed: bool,
}

impl Token {
    pub(super) fn slot(self) -> usize {
        usize::try_from(self.0 & u64::from(u32::MAX)).unwrap_or(usize::MAX)
    }
}

impl<H> Default for Table<H> {
    fn default() -> Self {
        Self {
            slots: Vec::new(),
            free: Vec::new(),
            deadlines: BTreeSet::new(),
            is_waiting: false,
            is_ended: false,
        }
    }
}

impl<H: Clone> Table<H> {
    pub(super) fn insert(&mut self, handler: impl FnOnce(Token) -> H) -> io::Result<Token> {
        if self.is_ended {
            return Err(io::Error::other("the broker ends"));
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.slots.push(Slot { generation: 0, registration: None });
                u32::try_from(self.slots.len() - 1).map_err(io::Error::other)?
            }
        };
        let slot = self.slots.get_mut(usize::try_from(index).unwrap_or(usize::MAX));
        let slot = slot.ok_or(io::ErrorKind::OutOfMemory)?;
        let token = Token(u64::from(slot.generation) << 32 | u64::from(index));
        let handler = handler(token);
        slot.registration =
            Some(Registration { handler, fd: None, deadline: None, is_armed: false });
        Ok(token)
    }

    pub(super) fn get(&mut self, token: Token) -> Option<&mut Registration<H>> {
        let slot = self.slots.get_mut(token.slot())?;
        slot.registration.as_mut().filter(|_| u64::from(slot.generation) == token.0 >> 32)
    }

    pub(super) fn remove(&mut self, token: Token) -> Option<Registration<H>> {
        let deadline = self.get(token)?.deadline;
        self.forget(deadline, token);
        let slot = self.slots.get_mut(token.slot())?;
        // The largest generation would make the last slot's token the number of the eventfd.
        slot.generation = if slot.generation >= u32::MAX - 1 { 0 } else { slot.generation + 1 };
        let removed = slot.registration.take();
        self.free.push(u32::try_from(token.slot()).ok()?);
        removed
    }

    pub(super) fn forget(&mut self, deadline: Option<Instant>, token: Token) {
        if let Some(deadline) = deadline {
            self.deadlines.remove(&(deadline, token));
        }
    }

    /// Ends and returns all registrations.
    pub(super) fn end(&mut self) -> Vec<Registration<H>> {
        self.is_ended = true;
        self.deadlines.clear();
        self.slots.drain(..).filter_map(|slot| slot.registration).collect()
    }

    /// The handler of an armed registration, which waits no more.
    pub(super) fn fire(&mut self, token: Token) -> Option<H> {
        let registration = self.get(token).filter(|registration| registration.is_armed)?;
        registration.is_armed = false;
        let (deadline, handler) = (registration.deadline.take(), registration.handler.clone());
        self.forget(deadline, token);
        Some(handler)
    }

    /// The first registration whose deadline has passed.
    pub(super) fn fire_due(&mut self, now: Instant) -> Option<(Token, H)> {
        let (_, token) = *self.deadlines.first().filter(|(deadline, _)| *deadline <= now)?;
        Some((token, self.fire(token)?))
    }
}
