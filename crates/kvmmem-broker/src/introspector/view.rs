// SPDX-License-Identifier: Apache-2.0 OR MIT
//! One view of an introspector's, and who is at work on it.

use std::collections::BTreeSet;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use kvmmem_abi::descriptor::FLAG_TOKENS;
use kvmmem_abi::native::STATE_OPEN;
use kvmmem_proto::map::Region;
use kvmmem_proto::scope::{Rights, Scope};
use kvmmem_qemu::monitor::Counts;
use kvmmem_qemu::windows::descriptor::Pages;
use kvmmem_qemu::windows::pci_slots::PciSlot;
use kvmmem_qemu::windows::plug::Plug;

use crate::core::layout::Layout;
use crate::reactor::{Reactor, Token};
use crate::sync::{lock, wait_while};

/// The broker's answer to an introspector's call to attach: what `Answer::Attached` has.
#[derive(Clone, Debug)]
pub(super) struct AttachAnswer {
    /// The broker's number for the view.
    pub(super) view: u64,
    pub(super) grant: u64,
    /// The broker's number for the target.
    pub(super) target: u64,
    pub(super) scope: Scope,
}

/// A view from the moment in which its token was used until nothing of it is left in QEMU.
#[derive(Debug)]
pub(super) struct View {
    /// The broker's number for it; 0 where it is what an earlier broker has left.
    pub(super) number: u64,
    pub(super) grant: u64,
    pub(super) target: u64,
    pub(super) scope: Scope,
    /// Further grants whose revocation ends the view: their tokens have mapped pages of it.
    ended_by: Mutex<BTreeSet<u64>>,
    /// What it shows of the target; `None` before that is known.
    regions: Mutex<Option<Vec<Region>>>,
    /// What had happened in QEMU before it was opened, and does not end it.
    pub(super) since: Counts,
    /// `None` where an earlier broker had them.
    pub(super) pages: Mutex<Option<Pages>>,
    pub(super) plug: Mutex<Plug>,
    pub(super) slots: Mutex<BTreeSet<PciSlot>>,
    life: Mutex<Life>,
    /// Signalled when the phase has changed.
    changed: Condvar,
    /// What waits in the reactor for its end.
    waiter: Mutex<Option<(Reactor, Token)>>,
}

#[derive(Debug)]
struct Life {
    phase: Phase,
    /// What ended it, `STATE_*` of the ABI.
    end: Option<u32>,
    /// Whether it was ever open: else no process of the guest knows its ticket.
    was_open: bool,
    /// Whether the guest can still reach devices of it, where it is stuck.
    has_devices: bool,
    /// Whether the tool has ended, which needs no acknowledgement in the descriptor page.
    is_acknowledged: bool,
}

/// Where a view is between being opened and being gone. In the first of these it is the opener's,
/// from the third on the introspector's thread's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    Opening,
    Open,
    Ending,
    /// The guest has not released it, or QEMU its memory: tried again from time to time.
    Stuck,
    Closed,
}

impl View {
    /// One that was attached when `since` had happened in QEMU. What it shows is said by
    /// [`Self::show`].
    pub(super) fn new(attached: &AttachAnswer, since: Counts) -> Self {
        let AttachAnswer { view, grant, target, scope } = attached;
        Self::with(*view, *grant, *target, scope.clone(), since)
    }

    /// What is left of an earlier broker's views.
    pub(super) fn left_over(plug: Plug) -> Self {
        let view = Self::with(0, 0, 0, Scope::whole(Rights::ReadOnly), Counts::default());
        *lock(&view.plug) = plug;
        view.settle_stuck(true);
        view
    }

    fn with(number: u64, grant: u64, target: u64, scope: Scope, since: Counts) -> Self {
        Self {
            number,
            grant,
            target,
            scope,
            ended_by: Mutex::default(),
            regions: Mutex::default(),
            since,
            pages: Mutex::default(),
            plug: Mutex::default(),
            slots: Mutex::default(),
            life: Mutex::new(Life {
                phase: Phase::Opening,
                end: None,
                was_open: false,
                has_devices: false,
                is_acknowledged: false,
            }),
            changed: Condvar::new(),
            waiter: Mutex::default(),
        }
    }

    /// Whether it is for tokens.
    pub(super) fn lists_tokens(&self) -> bool {
        lock(&self.pages).as_ref().is_some_and(|pages| pages.flags() & FLAG_TOKENS != 0)
    }

    /// Records that it ends by the revocation of a grant that is not its own. Whether it is not
    /// closed yet.
    pub(super) fn ends_by(&self, grant: u64) -> bool {
        let is_left = self.phase() != Phase::Closed;
        if is_left {
            lock(&self.ended_by).insert(grant);
        }
        is_left
    }

    /// The grants by whose revocation it ends or has ended.
    pub(super) fn grants(&self) -> BTreeSet<u64> {
        let mut grants = lock(&self.ended_by).clone();
        grants.insert(self.grant);
        grants
    }

    pub(super) fn phase(&self) -> Phase {
        lock(&self.life).phase
    }

    /// What has ended the view, if something has.
    pub(super) fn end(&self) -> Option<u32> {
        lock(&self.life).end
    }

    /// Says that the view ends with this state. Whether it has to be unplugged now: else it is
    /// gone, it is being unplugged already, or it is the opener's, who will have it undone.
    pub(super) fn claim(&self, state: u32) -> bool {
        let mut life = lock(&self.life);
        let is_free = matches!(life.phase, Phase::Open | Phase::Stuck);
        if life.phase != Phase::Closed {
            life.end.get_or_insert(state);
        }
        if is_free {
            life.phase = Phase::Ending;
        }
        drop(life);
        self.wake();
        is_free
    }

    /// Has the reactor call the handler of `token` once the view has ended.
    pub(super) fn wake_at_end(&self, reactor: &Reactor, token: Token) {
        *lock(&self.waiter) = Some((reactor.clone(), token));
        // It may have ended before.
        if self.end().is_some() {
            self.wake();
        }
    }

    fn wake(&self) {
        if let Some((reactor, token)) = &*lock(&self.waiter) {
            // It fails only for file descriptors, and takes none.
            let _ = reactor.arm(*token, None, Some(Instant::now()));
        }
    }

    /// The same for a view that is stuck, and for no other.
    pub(super) fn claim_stuck(&self) -> bool {
        let mut life = lock(&self.life);
        let is_stuck = life.phase == Phase::Stuck;
        if is_stuck {
            life.phase = Phase::Ending;
        }
        is_stuck
    }

    /// Ends the opener's work: the view is open where it is whole and nothing has ended it
    /// meanwhile. Else the introspector's thread has to undo it.
    pub(super) fn opened(&self, is_whole: bool) -> bool {
        let mut life = lock(&self.life);
        let is_open = is_whole && life.end.is_none();
        life.phase = if is_open { Phase::Open } else { Phase::Ending };
        life.was_open = is_open;
        self.changed.notify_all();
        is_open
    }

    /// Nothing is left of it.
    pub(super) fn settle_closed(&self) {
        lock(&self.life).phase = Phase::Closed;
        self.changed.notify_all();
    }

    /// Unplugging has come to no end; whether the guest can still reach devices.
    pub(super) fn settle_stuck(&self, has_devices: bool) {
        let mut life = lock(&self.life);
        (life.phase, life.has_devices) = (Phase::Stuck, has_devices);
        self.changed.notify_all();
    }

    /// Whether the guest may still reach its memory, as long as QEMU runs. Waits for nothing that
    /// asks QEMU.
    pub(super) fn is_reachable(&self) -> bool {
        let life = lock(&self.life);
        match life.phase {
            Phase::Closed => false,
            Phase::Opening | Phase::Ending | Phase::Open => true,
            Phase::Stuck => life.has_devices,
        }
    }

    /// Where the target's memory is that the view shows from now on: `now` looks that up, and a
    /// change that it does not find yet is pushed later. `None` where the view has ended.
    pub(super) fn show(&self, now: impl Fn() -> Option<Arc<Layout>>) -> Option<Arc<Layout>> {
        let mut layout = now()?;
        loop {
            *lock(&self.regions) = Some(self.scope.regions(&layout.map));
            // A change that was pushed in between has found what was there before.
            let later = now()?;
            if later.generation == layout.generation {
                return Some(layout);
            }
            layout = later;
        }
    }

    /// Whether the memory that the view shows is where `layout` has it.
    pub(super) fn is_unmoved(&self, layout: &Layout) -> bool {
        lock(&self.regions)
            .as_ref()
            .is_none_or(|regions| *regions == self.scope.regions(&layout.map))
    }

    /// Waits until it is neither being opened nor unplugged, or time is up.
    pub(super) fn wait_settled(&self, deadline: Instant) {
        let is_busy = |life: &mut Life| matches!(life.phase, Phase::Opening | Phase::Ending);
        drop(wait_while(&self.changed, lock(&self.life), deadline, is_busy));
    }

    /// Tells the guest's driver that the target's memory is where it was and holds something else,
    /// unless the view ends.
    pub(super) fn refresh(&self, instance: u64) {
        let life = lock(&self.life);
        if life.phase == Phase::Open && life.end.is_none() {
            if let Some(pages) = &mut *lock(&self.pages) {
                pages.set_instance(instance);
            }
            self.announce(STATE_OPEN);
        }
    }

    /// Tells the guest's driver that the view is in this state from now on.
    pub(super) fn announce(&self, state: u32) {
        if let Some(pages) = &mut *lock(&self.pages)
            && let Err(error) = pages.set_state(state)
        {
            // A page of memory that is there; and the guest is not trusted to look at it.
            tracing::warn!(view = self.number, %error, "cannot write a view's descriptor");
        }
    }

    /// Whether nothing of the view is mapped in the guest by a tool without the module.
    pub(super) fn is_released(&self) -> bool {
        let was_open = lock(&self.life).was_open;
        !was_open || self.is_seen()
    }

    /// Records that nothing of the view is mapped in the guest any more.
    pub(super) fn acknowledge_end(&self) {
        lock(&self.life).is_acknowledged = true;
    }

    /// Whether the guest's driver has acted upon the last change; true where it never had the
    /// page.
    pub(super) fn is_seen(&self) -> bool {
        let is_acknowledged = lock(&self.life).is_acknowledged;
        is_acknowledged || lock(&self.pages).as_ref().is_none_or(Pages::is_seen)
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use kvmmem_proto::map::MemoryMap;

    use super::*;

    /// The layout of a target whose memory is at an offset in its file.
    fn layout(generation: u64, offset: u64) -> Arc<Layout> {
        let regions = vec![Region { gpa: 0, len: 0x1000, offset, file: 0 }];
        let map = MemoryMap::new(regions).unwrap();
        Arc::new(Layout { generation, map, is_private: false })
    }

    fn view() -> View {
        View::with(7, 1, 1, Scope::whole(Rights::ReadOnly), Counts::default())
    }

    #[test]
    fn a_change_while_a_view_is_opened_is_never_missed() {
        let view = view();
        let [old, new] = [layout(1, 0), layout(2, 0x5000)];
        // Told before it is known what the view shows: it is going to be asked.
        assert!(view.is_unmoved(&new));
        // The change comes between the first look and the second.
        let looks = RefCell::new(vec![Arc::clone(&new), Arc::clone(&new), Arc::clone(&old)]);
        let shown = view.show(|| looks.borrow_mut().pop()).unwrap();
        assert_eq!(shown.generation, 2);
        assert!(view.is_unmoved(&new) && !view.is_unmoved(&old));
        // It comes after the second look: the view shows what was, and ends when it is told.
        let view = self::view();
        view.show(|| Some(Arc::clone(&old))).unwrap();
        assert!(!view.is_unmoved(&new));
        // The view has ended.
        assert!(view.show(|| None).is_none());
    }
}
