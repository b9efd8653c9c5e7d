// SPDX-License-Identifier: GPL-2.0-only
//! The target's memory where the host opens no window: pages of this kernel's own, each replaced by the target's
//! (hypercall 32) when it is first needed, and given back with all the others (33).

use kernel::prelude::*;
use kernel::sync::{Arc, Mutex, UniqueArc, new_mutex};

use crate::abi::ioctl::PAGE_SIZE;
use crate::abi::native;
use crate::attachment::AttachCall;
use crate::hypercall::{self, Way};
use crate::stats;
use crate::sys::{FreshPage, OwnPage};
use crate::table::map::Map;
use crate::tree::{self, Tree};

/// Behind all addresses that a target can have; which of them it has is known only by asking for them.
const END: u64 = 1 << 52;

/// A page that is shown, or for which the host is being asked.
#[pin_data]
struct Entry {
    /// Held while the host is asked: faults of other pages do not wait for it.
    #[pin]
    state: Mutex<State>,
}

enum State {
    New,
    Shown(Arc<OwnPage>),
    /// For whoever waited meanwhile. The entry is in no table any more, so that the next one asks again.
    Refused(Error),
}

/// The entries by target address. One leaves only when the host has refused its page.
#[derive(Default)]
struct Entries {
    tree: Tree<Arc<Entry>>,
    count: u64,
}

/// The pages of a view. The host gets all of them back when this is dropped, and the token is erased.
#[pin_data]
pub(crate) struct Pages {
    call: AttachCall,
    way: Way,
    limit: u64,
    #[pin]
    entries: Mutex<Entries>,
}

impl Pages {
    /// None yet. The host is not asked whether it knows the token.
    pub(crate) fn new(call: AttachCall) -> Result<Arc<Self>> {
        let (way, limit) = (hypercall::way()?, crate::max_pages_per_file());
        let pages =
            pin_init!(Self { call, way, limit, entries <- new_mutex!(Entries::default(), "kvmmem_pages") });
        Arc::pin_init(pages, GFP_KERNEL_ACCOUNT)
    }

    pub(crate) fn range(&self) -> native::Range {
        native::Range { gpa: 0, len: END }
    }

    /// Has the page of `gpa` shown, if it is not. `ENXIO` where the target has none, `ENOMEM` at the limit, else what
    /// the host's refusal means. Asks the host.
    pub(crate) fn prepare(&self, gpa: u64) -> Result {
        if gpa >= END {
            return Err(ENXIO);
        }
        let first = gpa - gpa % PAGE_SIZE;
        let entry = self.entry(first)?;
        let mut state = entry.state.lock();
        match &*state {
            State::Shown(_) => Ok(()),
            State::Refused(error) => Err(*error),
            State::New => match self.ask(first) {
                Ok(page) => {
                    *state = State::Shown(page);
                    Ok(())
                }
                Err(error) => {
                    *state = State::Refused(error);
                    let mut entries = self.entries.lock();
                    entries.count -= u64::from(entries.tree.remove(first).is_some());
                    Err(error)
                }
            },
        }
    }

    /// The page of `gpa`, and the offset in it: `ENXIO` where it is not shown.
    pub(crate) fn find(&self, gpa: u64) -> Result<(Arc<OwnPage>, u64)> {
        let entry = self.entries.lock().tree.get(gpa - gpa % PAGE_SIZE).cloned().ok_or(ENXIO)?;
        let state = entry.state.lock();
        match &*state {
            State::Shown(page) => Ok((page.clone(), gpa % PAGE_SIZE)),
            _ => Err(ENXIO),
        }
    }

    fn entry(&self, first: u64) -> Result<Arc<Entry>> {
        if let Some(entry) = self.entries.lock().tree.get(first) {
            return Ok(entry.clone());
        }
        let node = tree::slot()?;
        let entry = pin_init!(Entry { state <- new_mutex!(State::New, "kvmmem_page") });
        let entry = Arc::pin_init(entry, GFP_KERNEL_ACCOUNT)?;
        let mut entries = self.entries.lock();
        if let Some(entry) = entries.tree.get(first) {
            return Ok(entry.clone());
        }
        if entries.count >= self.limit {
            return Err(ENOMEM);
        }
        entries.count += 1;
        entries.tree.insert(node, first, entry.clone());
        Ok(entry)
    }

    fn ask(&self, gpa: u64) -> Result<Arc<OwnPage>> {
        // First, so that nothing fails once the host has agreed.
        let room = UniqueArc::<OwnPage>::new_uninit(GFP_KERNEL_ACCOUNT)?;
        let page = FreshPage::new()?.replace(&self.call, gpa, self.way).map_err(|answer| {
            stats::REFUSED.add_one();
            match hypercall::error(answer) {
                error if error == EFAULT => ENXIO,
                error => error,
            }
        })?;
        Ok(room.write(page).into())
    }
}
