// SPDX-License-Identifier: GPL-2.0-only
//! View: what an open file can reach of a target's memory, from ATTACH to DETACH.
//!
//! An offset or position is a guest-physical address of the target. The invariant: a change is
//! acknowledged to the host only once no page of the earlier generation is mapped or used.
//! [`crate::watch`] looks for changes in the background.

use kernel::bindings;
use kernel::fs::File;
use kernel::prelude::*;
use kernel::sync::atomic::{Acquire, Atomic, Relaxed, Release};
use kernel::sync::poll::{PollCondVarBox, PollTable};
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::workqueue::{new_delayed_work, DelayedWork};

use crate::contents::{Contents, EndCause};
use crate::regions::Regions;
use crate::stats;
use crate::sys::area::{file_offset, Areas, Fault, FaultError, FaultResult, NewArea};
use crate::sys::cpu::has_1g_pages;
use crate::sys::mapping::AddressSpace;
use crate::sys::published::{Published, Reader};

/// What an open file has of views.
#[pin_data]
pub(crate) struct View {
    #[pin]
    contents: Published<Contents>,
    /// Pages of earlier contents may still be mapped.
    is_replacing: Atomic<bool>,
    /// The generation that the tool knows of.
    seen: Atomic<i64>,
    pages: AddressSpace,
    waiters: PollCondVarBox,
    /// Whether the host's interrupt says when to look for changes. Set by [`crate::watch`].
    pub(crate) has_interrupt: Atomic<bool>,
    /// One ATTACH or DETACH at a time: held while the host is asked.
    #[pin]
    pub(crate) attaching: Mutex<()>,
    /// One change of the contents at a time.
    #[pin]
    changing: Mutex<()>,
    #[pin]
    pub(crate) regions: Mutex<Regions>,
    #[pin]
    pub(crate) work: DelayedWork<View>,
}

impl View {
    pub(crate) fn new(file: &File) -> Result<Arc<Self>> {
        let contents = KBox::new(Contents::none(), GFP_KERNEL_ACCOUNT)?;
        let view = try_pin_init!(Self {
            contents <- Published::new(contents, c"kvmmem_view", kernel::static_lock_class!()),
            is_replacing: Atomic::new(false),
            seen: Atomic::new(0),
            pages: AddressSpace::of(file)?,
            waiters: PollCondVarBox::new(c"kvmmem_waiters", kernel::static_lock_class!())?,
            has_interrupt: Atomic::new(false),
            attaching <- new_mutex!((), "kvmmem_attaching"),
            changing <- new_mutex!((), "kvmmem_changing"),
            regions <- new_mutex!(Regions::default(), "kvmmem_regions"),
            work <- new_delayed_work!("kvmmem_watch"),
        }? Error);
        Arc::pin_init(view, GFP_KERNEL_ACCOUNT)
    }

    /// What it shows, as far as is known. The host's next change waits until the reader is dropped:
    /// meanwhile the caller takes neither `changing` nor a PCI device's lock, and does not touch
    /// user memory.
    pub(crate) fn contents(&self) -> Reader<'_, Contents> {
        self.contents.read()
    }

    /// What it shows at this moment, and nothing else is mapped: looks whether the host has changed
    /// it. What was shown before, where that cannot be followed now.
    pub(crate) fn look(&self) -> Reader<'_, Contents> {
        let _ = self.refresh();
        loop {
            let contents = self.contents();
            if !self.is_replacing.load(Acquire) {
                return contents;
            }
            drop(contents);
            // Until earlier pages are gone.
            drop(self.changing.lock());
        }
    }

    /// What it shows, to a tool that thereby knows of all changes.
    pub(crate) fn take_event(&self) -> Reader<'_, Contents> {
        let contents = self.look();
        self.seen
            .store(contents.descriptor.generation as i64, Relaxed);
        contents
    }

    /// Shows what was opened. The caller holds `attaching`, and the file has no view.
    pub(crate) fn set(self: &Arc<Self>, opened: KBox<Contents>) {
        self.seen
            .store(opened.descriptor.generation as i64, Relaxed);
        let changing = self.changing.lock();
        self.replace(opened);
        drop(changing);
        self.begin_watch();
    }

    /// Ends the view: `ENOTCONN` if there is none. Its pages go from every process. The caller
    /// holds `attaching`.
    pub(crate) fn detach(&self) -> Result {
        self.contents().session()?;
        let none = KBox::new(Contents::none(), GFP_KERNEL_ACCOUNT)?;
        let _one = self.changing.lock();
        self.replace(none);
        self.waiters.notify_all();
        Ok(())
    }

    /// Looks whether the host has changed the view, and follows: afterwards no process has a page
    /// that is not shown any more, and then those who wait are woken. `EAGAIN` while the host
    /// is changing it, `ENOMEM` where this machine has no memory to follow: what was shown is
    /// out of date then, and the next look tries again. Does not wait for the host.
    pub(crate) fn refresh(&self) -> Result {
        if !self.contents().is_outdated() {
            return Ok(());
        }
        let _one = self.changing.lock();
        let next = {
            let contents = self.contents();
            if !contents.is_outdated() {
                return Ok(());
            }
            let next = KBox::new(contents.next()?, GFP_KERNEL_ACCOUNT)?;
            contents.session()?.events.add_one();
            next
        };
        stats::EVENTS.add_one();
        self.replace(next);
        self.waiters.notify_all();
        Ok(())
    }

    /// Replaces the contents. On return the earlier ones are neither mapped nor used, and the host
    /// knows. The caller holds `changing` and has no reader.
    fn replace(&self, next: KBox<Contents>) {
        // From here on faults use the new contents. Earlier pages are zapped; then the window is
        // unmapped.
        self.is_replacing.store(true, Relaxed);
        let before = self.contents.replace(next);
        if let Ok(window) = &before.window {
            for range in window.ranges() {
                self.pages.zap(range.gpa, range.len);
            }
        }
        self.is_replacing.store(false, Release);
        drop(before);
        let contents = self.contents();
        if let Some(claim) = contents.session().ok().and_then(|one| one.host.claim()) {
            match contents.window {
                Ok(_) => claim.followed(contents.descriptor.generation),
                Err(_) => claim.let_go(),
            }
        }
    }

    /// POLLERR without a view, POLLHUP once it has ended, else POLLIN; POLLPRI for a change that
    /// the tool has not asked for.
    pub(crate) fn poll(&self, file: &File, table: &PollTable<'_>) -> u32 {
        table.register_wait(file, &self.waiters);
        // A change that cannot be followed yet wakes the waiters when it is.
        let contents = self.look();
        let state = match contents.window {
            Ok(_) => bindings::POLLIN | bindings::POLLRDNORM,
            Err(EndCause::Detached) => return bindings::POLLERR,
            Err(_) => bindings::POLLHUP,
        };
        if self.seen.load(Relaxed) == contents.descriptor.generation as i64 {
            state
        } else {
            state | bindings::POLLPRI
        }
    }

    /// Maps the target's memory: `ENXIO` if none of it is in the view. The rest raises
    /// SIGBUS. `EAGAIN` while the host is changing the view: it is not waited for, as the
    /// process's memory is locked for writing.
    pub(crate) fn mmap(&self, area: &NewArea<'_, impl Areas>) -> Result {
        self.refresh()?;
        let contents = self.contents();
        let window = contents.window()?;
        let gpa = file_offset(area).ok_or(ENXIO)?;
        let len = (area.end() - area.start()) as u64;
        let end = gpa.checked_add(len).ok_or(ENXIO)?;
        window
            .first_from(gpa)
            .filter(|first| *first < end)
            .ok_or(ENXIO)?;
        if !contents.is_writable() {
            // Neither now nor later by mprotect.
            area.try_clear_maywrite().map_err(|_| EACCES)?;
        }
        // The target's memory is data.
        area.try_clear_mayexec().map_err(|_| EACCES)?;
        self.regions.lock().admit(area, gpa, len)?;
        area.fill_by_faults(contents.session()?.number);
        Ok(())
    }

    /// Maps one page, of any size. What is shown cannot change between looking and mapping; a
    /// change takes the pages away afterwards.
    pub(crate) fn fault(&self, fault: &Fault) -> Result<FaultResult, FaultError> {
        let contents = self.contents();
        // An area may be older than the session.
        let session = contents
            .session()
            .ok()
            .filter(|session| session.number == fault.number)
            .ok_or(FaultError::Bus)?;
        let result = insert(&contents, fault);
        session.faults.count(fault.order, &result);
        result
    }
}

fn insert(contents: &Contents, fault: &Fault) -> Result<FaultResult, FaultError> {
    let window = contents.window.as_ref().map_err(|_| FaultError::Bus)?;
    if fault.is_writable && !contents.is_writable() {
        return Err(FaultError::Bus);
    }
    if fault.order > 9 && !has_1g_pages() {
        return Err(FaultError::Smaller);
    }
    let gpa = fault.offset.ok_or(fault.refusal())?;
    let (memory, offset) = window.find(gpa).map_err(|error| match error {
        ENOMEM => FaultError::Memory,
        _ => fault.refusal(),
    })?;
    fault.insert(memory, offset)
}
