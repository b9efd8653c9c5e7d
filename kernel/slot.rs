// SPDX-License-Identifier: GPL-2.0-only
//! PCI slot that shows a view or a part of one: the descriptor page and up to seven windows.
//!
//! The host sends no interrupt. So a work polls the page of a view's first slot: until all windows
//! are bound, and then for changes while no view polls it. The interval grows while nothing
//! changes.
//!
//! One file has a slot, and only one ever; but any number of files have one that lists tokens, one
//! after the other or at a time.

use kernel::prelude::*;
use kernel::sync::barrier::{mb, Full};
use kernel::sync::{new_mutex, Arc, Completion, Mutex};
use kernel::time::Jiffies;
use kernel::workqueue::{self, impl_has_delayed_work, new_delayed_work, DelayedWork, WorkItem};

use crate::abi::descriptor::{
    COMPLAINT_AT, FLAGS_AT, FLAG_TOKENS, GENERATION_AT, SEEN_AT, SLOT_WINDOWS,
};
use crate::abi::token_list::{digest_at, mark, used_at, Digest, DIGEST_SIZE, MAX_TOKENS};
use crate::slots;
use crate::snapshot::PageCopy;
use crate::stats;
use crate::sys::memory::Memory;
use crate::sys::secret::is_equal;
use crate::users::Users;
use crate::watch;

/// BAR 2 of a function that is a window. Nothing maps it any more when the last reference is gone.
pub(crate) struct Bar {
    /// Its first address in this machine.
    pub(crate) start: u64,
    pub(crate) len: u64,
    /// Completed when the last reference is gone.
    pub(crate) unused: Arc<Completion>,
}

impl Bar {
    pub(crate) fn new(start: u64, len: u64) -> Result<Arc<Self>> {
        Ok(Arc::new(
            Self {
                start,
                len,
                unused: Arc::pin_init(Completion::new(), GFP_KERNEL)?,
            },
            GFP_KERNEL,
        )?)
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        self.unused.complete_all();
    }
}

/// A window that is plugged in, or what there is to complain of: `COMPLAINT_*`.
pub(crate) type Window = Result<Arc<Bar>, u32>;

/// Function 0 of a slot.
pub(crate) struct Head {
    pub(crate) page: Memory,
    /// SHA-256 of the token.
    pub(crate) digest: [u8; 32],
    /// Number of the slot in its view.
    pub(crate) number: u32,
}

impl Head {
    /// Whether the page has a token list.
    fn lists_tokens(&self) -> bool {
        self.number == 0 && self.u32_at(FLAGS_AT) & FLAG_TOKENS != 0
    }

    /// Whether an entry of the token list has this digest. The time does not tell where they
    /// differ.
    fn lists(&self, entry: usize, digest: &Digest) -> bool {
        let [mut listed, mut wanted] = [[0; 32]; 2];
        for (index, word) in listed.chunks_exact_mut(8).take(DIGEST_SIZE / 8).enumerate() {
            let at = digest_at(entry) + 8 * index;
            word.copy_from_slice(&self.page.read_u64(at).to_le_bytes());
        }
        for (to, from) in wanted.iter_mut().zip(digest) {
            *to = *from;
        }
        is_equal(&listed, &wanted)
    }

    /// The number at `at`, a multiple of 4.
    fn u32_at(&self, at: usize) -> u32 {
        (self.page.read_u64(at & !7) >> (8 * (at & 4))) as u32
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Windows are missing, or the host was changing the page.
    Incomplete,
    /// A complaint was written for the host.
    Refused,
    /// The host knows that all is there.
    Ready,
    /// A file has it, or several have it.
    Claimed,
    /// The same, and some of it is gone.
    Lost,
    /// A file had it, which none has again.
    Used,
}

struct State {
    head: Option<Head>,
    windows: [Option<Window>; SLOT_WINDOWS as usize],
    phase: Phase,
    /// Those that have it, where it is claimed or lost.
    users: Users,
    /// Between two looks: longer and longer while nothing changes.
    pause: Jiffies,
}

/// A slot, as long as one of its functions is bound or a file has it.
#[pin_data]
pub(crate) struct Slot {
    place: u32,
    #[pin]
    state: Mutex<State>,
    #[pin]
    work: DelayedWork<Slot>,
}

impl_has_delayed_work! {
    impl HasDelayedWork<Self> for Slot { self.work }
}

impl WorkItem for Slot {
    type Pointer = Arc<Self>;

    fn run(this: Arc<Self>) {
        if this.phase() == Phase::Incomplete {
            slots::check(&this);
        }
        let pause = this.state.lock().tick();
        if let Some(pause) = pause {
            this.look_in(pause);
        }
    }
}

impl State {
    /// Acts upon a change where no view does. When to look again, if at all.
    fn tick(&mut self) -> Option<Jiffies> {
        let head = self.head.as_ref().filter(|head| head.number == 0)?;
        let is_quiet = match self.phase {
            // What is missing is looked for when it is plugged in. The host may also finish
            // changing the page.
            Phase::Incomplete => true,
            Phase::Refused | Phase::Claimed | Phase::Lost => return None,
            Phase::Ready | Phase::Used => {
                let generation = head.page.read_u64(GENERATION_AT);
                let is_seen = generation == head.page.read_u64(SEEN_AT);
                if generation % 2 == 0 && !is_seen {
                    head.page.write_u64(SEEN_AT, generation);
                }
                is_seen
            }
        };
        self.pause = if is_quiet {
            self.pause.saturating_mul(2).min(watch::longest_pause())
        } else {
            watch::delay()
        };
        Some(self.pause)
    }

    /// Adds a user where the slot is in one of these phases; returns its number.
    fn join(&mut self, phases: &[Phase]) -> Result<Option<u64>> {
        let Some(head) = self.head.as_ref().filter(|_| phases.contains(&self.phase)) else {
            return Ok(None);
        };
        let user = self.users.add(head.page.read_u64(SEEN_AT))?;
        self.phase = Phase::Claimed;
        Ok(Some(user))
    }

    /// Tells the host what all users have followed.
    fn acknowledge(&self) {
        if let (Phase::Claimed, Some(head), Some(generation)) =
            (self.phase, &self.head, self.users.followed())
        {
            head.page.write_u64(SEEN_AT, generation);
        }
    }
}

impl Slot {
    pub(crate) fn new(place: u32) -> Result<Arc<Self>> {
        let state = State {
            head: None,
            windows: [const { None }; 7],
            phase: Phase::Incomplete,
            users: Users::new(),
            pause: watch::delay(),
        };
        let slot = pin_init!(Self {
            place,
            state <- new_mutex!(state, "kvmmem_slot"),
            work <- new_delayed_work!("kvmmem_slot"),
        });
        Arc::pin_init(slot, GFP_KERNEL)
    }

    /// Domain, bus and slot, as [`crate::sys::pci::place`] has them.
    pub(crate) fn place(&self) -> u32 {
        self.place
    }

    fn phase(&self) -> Phase {
        self.state.lock().phase
    }

    pub(crate) fn has_head(&self) -> bool {
        self.state.lock().head.is_some()
    }

    pub(crate) fn is_empty(&self) -> bool {
        let state = self.state.lock();
        state.head.is_none() && state.windows.iter().all(Option::is_none)
    }

    pub(crate) fn digest(&self) -> Option<[u8; 32]> {
        Some(self.state.lock().head.as_ref()?.digest)
    }

    /// Whether it is slot `number` of the view with this digest.
    pub(crate) fn is_part(&self, digest: &[u8; 32], number: u32) -> bool {
        let state = self.state.lock();
        state
            .head
            .as_ref()
            .is_some_and(|head| head.number == number && is_equal(&head.digest, digest))
    }

    pub(crate) fn set_head(&self, head: Head) {
        self.state.lock().head = Some(head);
    }

    pub(crate) fn take_head(&self) {
        self.state.lock().head = None;
    }

    /// Window `number` of the slot, from 1 on.
    pub(crate) fn window(&self, number: u32) -> Option<Window> {
        self.state
            .lock()
            .windows
            .get(number.checked_sub(1)? as usize)?
            .clone()
    }

    pub(crate) fn set_window(&self, number: u32, window: Option<Window>) {
        if let Some(place) = self
            .state
            .lock()
            .windows
            .get_mut(number.wrapping_sub(1) as usize)
        {
            *place = window;
        }
    }

    /// Something of its view was plugged in.
    pub(crate) fn look_soon(self: &Arc<Self>) {
        let mut state = self.state.lock();
        if state.phase == Phase::Refused {
            state.phase = Phase::Incomplete;
        }
        if state.phase == Phase::Incomplete && state.head.is_some() {
            state.pause = watch::delay();
            self.look_in(0);
        }
    }

    /// Something of its view was unplugged: a file that has it has lost it.
    pub(crate) fn lose(self: &Arc<Self>) {
        let mut state = self.state.lock();
        state.phase = match state.phase {
            Phase::Claimed | Phase::Lost => Phase::Lost,
            Phase::Used => Phase::Used,
            Phase::Incomplete | Phase::Refused | Phase::Ready => Phase::Incomplete,
        };
    }

    /// The digest and a copy of the page. Of a view's first slot only.
    pub(crate) fn copy(&self) -> Option<([u8; 32], Result<PageCopy>)> {
        let state = self.state.lock();
        let head = state.head.as_ref().filter(|head| head.number == 0)?;
        Some((head.digest, PageCopy::of(&head.page)))
    }

    /// Tells the host that all is there. The caller sees to it that this stays so meanwhile.
    pub(crate) fn report(&self, generation: u64) {
        let mut state = self.state.lock();
        if let (Phase::Incomplete, Some(head)) = (state.phase, &state.head) {
            head.page.write_u64(SEEN_AT, generation);
            state.phase = Phase::Ready;
        }
    }

    /// Tells the host what will not do.
    pub(crate) fn complain(&self, complaint: u32) {
        let mut state = self.state.lock();
        if let Some(head) = &state.head {
            stats::complain(complaint);
            head.page.write_u32(COMPLAINT_AT, complaint);
        }
        if state.phase == Phase::Incomplete {
            state.phase = Phase::Refused;
        }
    }

    /// Takes it for a file, if it is the first slot of the view with this digest, and no file has
    /// had it; returns the number of the user.
    pub(crate) fn claim(&self, digest: &[u8; 32]) -> Result<Option<u64>> {
        if !self.is_part(digest, 0) {
            return Ok(None);
        }
        self.state.lock().join(&[Phase::Ready])
    }

    /// Takes it for one more file, where it lists tokens; returns the number of the user.
    pub(crate) fn share(&self) -> Result<Option<u64>> {
        let mut state = self.state.lock();
        if !state.head.as_ref().is_some_and(Head::lists_tokens) {
            return Ok(None);
        }
        state.join(&[Phase::Ready, Phase::Claimed])
    }

    /// The entry of the page's token list with this digest. It looks at all of them, so that the
    /// time does not tell which it is.
    pub(crate) fn find_token(&self, digest: &Digest) -> Option<usize> {
        let state = self.state.lock();
        let head = state.head.as_ref().filter(|head| head.lists_tokens())?;
        let mut found = None;
        for entry in 0..MAX_TOKENS {
            if head.lists(entry, digest) {
                found = Some(entry);
            }
        }
        found
    }

    /// Uses the token of an entry, once: whether it was still to be used.
    pub(crate) fn use_token(&self, entry: usize, digest: &Digest) -> bool {
        let state = self.state.lock();
        let Some(head) = &state.head else {
            return false;
        };
        if head.u32_at(used_at(entry)) == mark(digest) {
            return false;
        }
        head.page.write_u32(used_at(entry), mark(digest));
        // The host withdraws a token, and then looks at the mark: one of both sees the other.
        mb(Full);
        head.lists(entry, digest)
    }

    /// For the file that has it: uses the page. `None` where something was unplugged.
    pub(crate) fn with_page<R>(&self, use_it: impl FnOnce(&Memory) -> R) -> Option<R> {
        let state = self.state.lock();
        match (&state.head, state.phase) {
            (Some(head), Phase::Claimed) => Some(use_it(&head.page)),
            _ => None,
        }
    }

    /// For a user: nothing of a generation before this one is used any more.
    pub(crate) fn followed(&self, user: u64, generation: u64) {
        let mut state = self.state.lock();
        state.users.follow(user, generation);
        state.acknowledge();
    }

    /// A user did not come to use it: another one may take it.
    pub(crate) fn put_back(self: &Arc<Self>, user: u64) {
        self.leave(user, Phase::Ready);
    }

    /// A user uses nothing of it any more.
    pub(crate) fn let_go(self: &Arc<Self>, user: u64) {
        self.leave(user, Phase::Used);
    }

    /// Removes a user; the last one leaves the slot in this phase, unless it lists tokens.
    fn leave(self: &Arc<Self>, user: u64, phase: Phase) {
        let mut state = self.state.lock();
        if !state.users.remove(user) {
            return;
        }
        if state.users.followed().is_some() {
            state.acknowledge();
            return;
        }
        let is_shared = state.head.as_ref().is_some_and(Head::lists_tokens);
        state.phase = match state.phase {
            Phase::Lost => Phase::Used,
            _ if is_shared => Phase::Ready,
            _ => phase,
        };
        // Not after function 0 was unbound: it has waited for the work.
        if state.head.is_some() {
            self.look_in(0);
        }
    }

    /// Has the work look, unless it is about to.
    fn look_in(self: &Arc<Self>, delay: Jiffies) {
        // An error says that it is queued already.
        let _ = workqueue::system_power_efficient().enqueue_delayed(self.clone(), delay);
    }
}
