// SPDX-License-Identifier: GPL-2.0-only
//! Where the target's memory comes from: a window that the host opens, or pages that it replaces one by one.

use core::ops::Deref;

use kernel::prelude::*;
use kernel::sync::Arc;

use crate::abi::native;
use crate::pages::Pages;
use crate::sys::{Memory, OwnPage};
use crate::window::Window;

/// What shows the target's memory at one generation of a view.
#[derive(Clone)]
pub(crate) enum Provider {
    Window(Arc<Window>),
    Pages(Arc<Pages>),
}

/// Memory of a provider, which stays as long as this.
pub(crate) enum Place<'a> {
    Window(&'a Memory),
    Page(Arc<OwnPage>),
}

impl Deref for Place<'_> {
    type Target = Memory;

    fn deref(&self) -> &Memory {
        match self {
            Self::Window(memory) => memory,
            Self::Page(page) => page,
        }
    }
}

impl Provider {
    /// Does what [`Self::find`] needs and what may ask the host: the caller holds no lock of the view. `ENXIO` where
    /// there is no memory.
    pub(crate) fn prepare(&self, gpa: u64) -> Result {
        match self {
            Self::Window(_) => Ok(()),
            Self::Pages(pages) => pages.prepare(gpa),
        }
    }

    /// Gives it up, and waits for those who are copying from it or to it at this moment. Pages of the module's own are
    /// given back by whoever uses them last.
    pub(crate) fn wait_until_unused(self) {
        if let Self::Window(window) = self {
            let waiter = window.waiter();
            drop(window);
            waiter.wait();
        }
    }

    /// The memory that holds `gpa`, and the offset in it. `ENXIO` where none does.
    pub(crate) fn find(&self, gpa: u64) -> Result<(Place<'_>, u64)> {
        match self {
            Self::Window(window) => window.find(gpa).map(|(memory, offset)| (Place::Window(memory), offset)),
            Self::Pages(pages) => pages.find(gpa).map(|(page, offset)| (Place::Page(page), offset)),
        }
    }

    /// The first address at or after `gpa` that may hold memory.
    pub(crate) fn first_from(&self, gpa: u64) -> Option<u64> {
        match self {
            Self::Window(window) => window.first_from(gpa),
            Self::Pages(_) => Some(gpa).filter(|gpa| *gpa < self.end()),
        }
    }

    /// Whether `gpa` is in a range.
    pub(crate) fn contains(&self, gpa: u64) -> bool {
        self.first_from(gpa) == Some(gpa)
    }

    /// The first address at or after `gpa` that is in no range.
    pub(crate) fn first_hole_from(&self, gpa: u64) -> u64 {
        match self {
            Self::Window(window) => window.first_hole_from(gpa),
            Self::Pages(_) => gpa.max(self.end()),
        }
    }

    /// Where the last range ends.
    pub(crate) fn end(&self) -> u64 {
        match self {
            Self::Window(window) => window.end(),
            Self::Pages(pages) => pages.range().len,
        }
    }

    /// How many ranges there are.
    pub(crate) fn count(&self) -> usize {
        match self {
            Self::Window(window) => window.ranges().len(),
            Self::Pages(_) => 1,
        }
    }

    pub(crate) fn ranges(&self) -> impl Iterator<Item = native::Range> + '_ {
        let (window, pages) = match self {
            Self::Window(window) => (Some(window.ranges()), None),
            Self::Pages(pages) => (None, Some(pages.range())),
        };
        Iterator::chain(window.into_iter().flatten(), pages)
    }
}
