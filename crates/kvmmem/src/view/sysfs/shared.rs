// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the view, its mappings and its watcher share: the devices, and what they show.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, Weak};
use std::time::{Duration, Instant};

use kvmmem_abi::descriptor::{COMPLAINT_INVALID, SEEN_ALL, WindowRange};
use kvmmem_abi::native::{RIGHT_WRITE, STATE_OPEN, STATE_REVOKED};
use kvmmem_memory::Range;
use kvmmem_sys::foreign::Foreign;
use rustix::io::Errno;

use super::bar::Bar;
use super::discover::Devices;
use super::head::{PageError, Snapshot};
use crate::view::clear::clear;
use crate::view::error::{ViewError, ViewOperation};
use crate::view::events::Events;
use crate::view::status::{Event, State, Status};

/// The most bytes that one proof is for: the view's end waits for it.
pub(crate) const PROOF_LIMIT: usize = 1 << 20;

/// How long an access waits while the host is changing the view, and how often it looks.
const BUSY_LIMIT: Duration = Duration::from_secs(1);
const BUSY_PAUSE: Duration = Duration::from_micros(500);

#[derive(Debug)]
pub(super) struct Shared {
    /// Held for reading while the devices' memory is accessed.
    reach: RwLock<Reach>,
    /// Other mappings of the windows. Locked after `reach`.
    mappings: Mutex<Vec<Weak<Foreign>>>,
    events: Events,
    /// Whether the view has ended and a mapping of it cannot be removed.
    is_stuck: AtomicBool,
    /// The process that attached.
    process: u32,
}

#[derive(Debug)]
pub(super) struct Reach {
    generation: u64,
    state: State,
    snapshot: Snapshot,
    /// `None` once the view has ended.
    devices: Option<Devices>,
}

/// Whether the view goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Follow {
    Open,
    Ended,
}

/// Why an access is worth nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Unproven {
    /// The view has ended.
    Ended(State),
    /// The host is changing the view.
    Busy,
    /// The view has no memory there.
    Hole(u64),
    /// The system refused.
    System(Errno),
}

impl Unproven {
    /// The error of an operation at `gpa`.
    pub(super) fn of(self, operation: ViewOperation, gpa: u64) -> ViewError {
        match self {
            Self::Ended(State::Revoked) => ViewError::Revoked { operation },
            Self::Ended(_) => ViewError::Gone { operation },
            Self::Busy => ViewError::System { operation, source: Errno::AGAIN },
            Self::Hole(at) => ViewError::Hole { operation, gpa: at.max(gpa) },
            Self::System(source) => ViewError::System { operation, source },
        }
    }
}

impl Shared {
    pub(super) fn new(devices: Devices, snapshot: Snapshot) -> Self {
        let generation = snapshot.descriptor.generation;
        let state = State::Open;
        Self {
            reach: RwLock::new(Reach { generation, state, snapshot, devices: Some(devices) }),
            mappings: Mutex::default(),
            events: Events::new(generation),
            is_stuck: AtomicBool::new(false),
            process: std::process::id(),
        }
    }

    /// Whether this is not a child that was forked.
    pub(super) fn is_own_process(&self) -> bool {
        std::process::id() == self.process
    }

    /// Whether nothing of a view that has ended is mapped any more.
    pub(super) fn is_released(&self) -> bool {
        !self.is_stuck.load(Ordering::Acquire)
    }

    pub(super) fn is_writable(&self) -> bool {
        let reach = self.reach();
        let windows = reach.devices.iter().flat_map(|devices| devices.windows.values());
        let rights = reach.snapshot.descriptor.rights;
        rights & RIGHT_WRITE != 0 && windows.clone().all(|bar| bar.memory().is_writable())
    }

    pub(super) fn status(&self) -> Status {
        let reach = self.reach();
        let Snapshot { descriptor, ranges, .. } = &reach.snapshot;
        let ranges = ranges.iter().filter(|_| reach.state == State::Open);
        Status {
            generation: reach.generation,
            state: reach.state,
            is_writable: descriptor.rights & RIGHT_WRITE != 0,
            uuid: descriptor.uuid,
            ranges: ranges.map(|range| Range { gpa: range.gpa, len: range.len }).collect(),
        }
    }

    pub(super) fn instance(&self) -> Option<u64> {
        let instance = self.reach().snapshot.descriptor.instance;
        (instance != 0).then_some(instance)
    }

    /// Copies as many bytes as one window has from `gpa` on, and returns how many.
    pub(super) fn read(&self, gpa: u64, buf: &mut [u8]) -> Result<usize, Unproven> {
        self.prove(gpa, 1, |reach| {
            let (bar, offset, len) = reach.place(gpa, buf.len()).ok_or(Unproven::Hole(gpa))?;
            let part = buf.get_mut(..len).unwrap_or_default();
            bar.memory().read(offset, part).map_err(|_| Unproven::System(Errno::IO))?;
            Ok(len)
        })?
    }

    /// Copies as many of `bytes` as fit in one window to `gpa` on, and returns how many.
    pub(super) fn write(&self, gpa: u64, bytes: &[u8]) -> Result<usize, Unproven> {
        self.prove(gpa, 1, |reach| {
            let (bar, offset, len) = reach.place(gpa, bytes.len()).ok_or(Unproven::Hole(gpa))?;
            let part = bytes.get(..len).unwrap_or_default();
            bar.memory().write(offset, part).map_err(|_| Unproven::System(Errno::IO))?;
            Ok(len)
        })?
    }

    /// Maps `range`, which the view has, once more, in one piece.
    pub(super) fn map(&self, range: Range) -> Result<Arc<Foreign>, Unproven> {
        // Held until the mapping is in the list, so that no end of the view comes in between.
        let reach = self.reach();
        let devices = reach.devices.as_ref().ok_or(Unproven::Ended(reach.state))?;
        let (first, ..) = reach.place(range.gpa, 1).ok_or(Unproven::Hole(range.gpa))?;
        let memory = first.reserve_like(range.len, range.gpa).map_err(Unproven::System)?;
        for part in &reach.snapshot.ranges {
            let start = part.gpa.max(range.gpa);
            let end = (part.gpa + part.len).min(range.end());
            let Some(bar) = devices.windows.get(&part.window).filter(|_| start < end) else {
                continue;
            };
            let (at, from) = (start - range.gpa, part.offset + (start - part.gpa));
            bar.place(&memory, at, end - start, from).map_err(|errno| match errno {
                Errno::NODEV => Unproven::Ended(State::Gone),
                errno => Unproven::System(errno),
            })?;
        }
        let memory = Arc::new(memory);
        let mut mappings = self.mappings();
        mappings.retain(|mapping| mapping.strong_count() > 0);
        mappings.push(Arc::downgrade(&memory));
        Ok(memory)
    }

    /// Makes an access to the windows that have the `len` bytes at `gpa`, and proves that it was to
    /// this view's memory, while it was open. It is made again where the host has changed the view
    /// meanwhile and goes on showing it.
    pub(super) fn prove<T>(
        &self,
        gpa: u64,
        len: u64,
        mut access: impl FnMut(&Reach) -> T,
    ) -> Result<T, Unproven> {
        if !self.is_own_process() {
            return Err(Unproven::Ended(State::Gone));
        }
        let began = Instant::now();
        loop {
            let reach = self.reach();
            let devices = reach.devices.as_ref().ok_or(Unproven::Ended(reach.state))?;
            let is_current =
                || devices.head.header().is_ok_and(|header| header == reach.snapshot.header);
            if is_current() {
                let outcome = access(&reach);
                // The page first: it tells of an end before the devices go.
                if is_current() && reach.bars(gpa, len).all(Bar::is_alive) {
                    return Ok(outcome);
                }
            }
            drop(reach);
            if self.follow() == Follow::Open {
                if began.elapsed() > BUSY_LIMIT {
                    return Err(Unproven::Busy);
                }
                std::thread::sleep(BUSY_PAUSE);
            }
        }
    }

    /// Tells the host that the view is used as it is.
    pub(super) fn acknowledge(&self) {
        let reach = self.reach();
        if let Some(devices) = &reach.devices {
            devices.head.acknowledge(reach.snapshot.descriptor.generation);
        }
    }

    /// Does what the descriptor page says, if it says something new; ends the view where devices
    /// have gone.
    pub(super) fn follow(&self) -> Follow {
        let state = {
            let reach = self.reach();
            let Some(devices) = &reach.devices else { return Follow::Ended };
            let is_alive =
                || devices.head.is_alive() && devices.windows.values().all(Bar::is_alive);
            match devices.head.header() {
                Ok(header) if header == reach.snapshot.header && is_alive() => {
                    return Follow::Open;
                }
                _ => {}
            }
            let length = |number| devices.windows.get(&number).map(Bar::len);
            let page = devices.head.read(length);
            // What is read of a device that has gone means nothing.
            if is_alive() { reach.after(page) } else { Next::End(State::Gone, None) }
        };
        match state {
            Next::Wait => Follow::Open,
            Next::End(state, instance) => {
                self.end(state, instance);
                Follow::Ended
            }
            Next::Lie => {
                if let Some(devices) = &self.reach().devices {
                    devices.head.complain(COMPLAINT_INVALID);
                }
                self.end(State::Gone, None);
                Follow::Ended
            }
            Next::Show(snapshot) => {
                self.show(*snapshot);
                Follow::Open
            }
        }
    }

    /// Goes over to what the page says now. No access to what it said before is under way when the
    /// host hears of it.
    fn show(&self, snapshot: Snapshot) {
        let mut reach = self.reach.write().unwrap_or_else(PoisonError::into_inner);
        // Another thread may have been faster.
        if snapshot.descriptor.generation > reach.snapshot.descriptor.generation {
            let is_elsewhere = snapshot.ranges != reach.snapshot.ranges;
            reach.generation = snapshot.descriptor.generation;
            reach.snapshot = snapshot;
            // Those who have mapped what was there map what is there now.
            if is_elsewhere && !self.clear_mappings() {
                drop(reach);
                return self.end(State::Gone, None);
            }
            if let Some(devices) = &reach.devices {
                devices.head.acknowledge(reach.generation);
            }
        }
        drop(reach);
        self.events.signal();
    }

    /// Ends the view, if it has not ended: no access is under way and nothing is mapped any more
    /// when the host hears of it. `instance` is the target's at the end, where the page has it: a
    /// reset may have come just before.
    pub(super) fn end(&self, state: State, instance: Option<u64>) {
        let mut reach = self.reach.write().unwrap_or_else(PoisonError::into_inner);
        let Some(Devices { head, windows }) = reach.devices.take() else { return };
        reach.generation = reach.generation.saturating_add(1);
        reach.state = state;
        if let Some(instance) = instance {
            reach.snapshot.descriptor.instance = instance;
        }
        drop(windows);
        if self.clear_mappings() {
            head.acknowledge(SEEN_ALL);
        } else {
            self.is_stuck.store(true, Ordering::Release);
            tracing::error!("a mapping of a view that has ended cannot be removed");
        }
        drop(head);
        // Only now can others see that it has ended.
        drop(reach);
        self.events.signal();
    }

    /// Removes the memory of all mappings; `false` where one keeps it, which stays listed. Nothing
    /// maps meanwhile, as `reach` is held for writing.
    fn clear_mappings(&self) -> bool {
        let mut mappings = self.mappings();
        mappings.retain(|mapping| mapping.upgrade().is_some_and(|memory| !clear(&memory)));
        mappings.is_empty()
    }

    /// Waits for something that has not been reported.
    pub(super) fn wait(&self, timeout: Duration) -> Option<Event> {
        self.events.wait(timeout, || {
            let reach = self.reach();
            (reach.state, reach.generation)
        })
    }

    fn reach(&self) -> RwLockReadGuard<'_, Reach> {
        self.reach.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn mappings(&self) -> MutexGuard<'_, Vec<Weak<Foreign>>> {
        self.mappings.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What to do about a descriptor page.
enum Next {
    Wait,
    Show(Box<Snapshot>),
    End(State, Option<u64>),
    Lie,
}

impl Reach {
    /// What to do about what the page says, which is not what it said before.
    fn after(&self, page: Result<Snapshot, PageError>) -> Next {
        match page {
            Ok(new) => {
                let (old, now) = (&self.snapshot.descriptor, &new.descriptor);
                let is_same = old.token_digest == now.token_digest && old.rights == now.rights;
                match now.state {
                    _ if !is_same || now.generation < old.generation => Next::Lie,
                    STATE_OPEN if now.generation == old.generation => Next::Wait,
                    STATE_OPEN => Next::Show(Box::new(new)),
                    STATE_REVOKED => Next::End(State::Revoked, Some(now.instance)),
                    _ => Next::End(State::Gone, Some(now.instance)),
                }
            }
            Err(PageError::Changing) => Next::Wait,
            Err(PageError::Lost) => Next::End(State::Gone, None),
            Err(PageError::Missing(_) | PageError::Invalid(_)) => Next::Lie,
        }
    }

    /// The window that has `gpa`, the offset there, and how many of `len` bytes it has from there
    /// on, at most [`PROOF_LIMIT`].
    fn place(&self, gpa: u64, len: usize) -> Option<(&Bar, u64, usize)> {
        let range = self.ranges(gpa, 1).next()?;
        let within = gpa - range.gpa;
        let left = usize::try_from(range.len - within).unwrap_or(usize::MAX);
        let bar = self.devices.as_ref()?.windows.get(&range.window)?;
        Some((bar, range.offset + within, len.min(left).min(PROOF_LIMIT)))
    }

    /// The windows that have some of the `len` bytes at `gpa`.
    fn bars(&self, gpa: u64, len: u64) -> impl Iterator<Item = &Bar> {
        let windows = self.devices.as_ref().map(|devices| &devices.windows);
        self.ranges(gpa, len).filter_map(move |range| windows?.get(&range.window))
    }

    /// The ranges that have some of the `len` bytes at `gpa`.
    fn ranges(&self, gpa: u64, len: u64) -> impl Iterator<Item = &WindowRange> {
        let end = gpa.saturating_add(len);
        self.snapshot.ranges.iter().filter(move |it| it.gpa < end && it.gpa + it.len > gpa)
    }
}
