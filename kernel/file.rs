// SPDX-License-Identifier: GPL-2.0-only
//! View file: the view of an open file, and read, write, lseek, poll and mmap on it.
//!
//! An offset or position is a guest-physical address of the target.

use kernel::bindings;
use kernel::fs::File;
use kernel::iov::{IovIterDest, IovIterSource};
use kernel::mm::virt::{flags, VmaRef};
use kernel::prelude::*;
use kernel::sync::poll::{PollCondVarBox, PollTable};
use kernel::sync::{new_mutex, Arc, Mutex};
use kernel::time::delay::fsleep;

use crate::abi::hypercall::{SEEK_DATA, SEEK_HOLE};
use crate::attachment::AttachCall;
use crate::regions::Regions;
use crate::sys::area::{file_offset, Areas, Fault, FaultError, FaultResult, NewArea};
use crate::sys::cpu::has_1g_pages;
use crate::sys::iter::UserBuffer;
use crate::sys::mapping::AddressSpace;
use crate::sys::task::is_killed;
use crate::view::{View, PAUSE, TRIES};
use crate::watch::WatchedView;
use crate::window::Window;

/// The most that is copied between two looks at the generation.
const CHUNK: usize = 1 << 18;

/// How often a read begins anew because the view has changed meanwhile.
const CHANGES: u32 = 8;

/// What an open file has of views.
#[pin_data]
pub(crate) struct ViewFile {
    waiters: Arc<PollCondVarBox>,
    /// One ATTACH or DETACH at a time: held while the host is asked.
    #[pin]
    pub(crate) attaching: Mutex<()>,
    #[pin]
    view: Mutex<Option<WatchedView>>,
    #[pin]
    pub(crate) regions: Mutex<Regions>,
}

impl ViewFile {
    pub(crate) fn new() -> Result<Pin<KBox<Self>>> {
        let waiters = PollCondVarBox::new(c"kvmmem_waiters", kernel::static_lock_class!())?;
        let waiters = Arc::new(waiters, GFP_KERNEL_ACCOUNT)?;
        let file = pin_init!(Self {
            waiters,
            attaching <- new_mutex!((), "kvmmem_attaching"),
            view <- new_mutex!(None, "kvmmem_file"),
            regions <- new_mutex!(Regions::default(), "kvmmem_regions"),
        });
        KBox::pin_init(file, GFP_KERNEL_ACCOUNT)
    }

    /// The file's view: `ENOTCONN` where it has none.
    pub(crate) fn view(&self) -> Result<Arc<View>> {
        self.view
            .lock()
            .as_ref()
            .map(|view| Arc::clone(view))
            .ok_or(ENOTCONN)
    }

    pub(crate) fn has_view(&self) -> bool {
        self.view.lock().is_some()
    }

    /// A view as `call` asks for it, not yet the file's.
    pub(crate) fn open_view(
        &self,
        file: &File,
        call: AttachCall,
        view_flags: u32,
    ) -> Result<Arc<View>> {
        View::open(
            call,
            view_flags,
            AddressSpace::of(file)?,
            self.waiters.clone(),
        )
    }

    /// Gives the file its view. The caller holds `attaching` and has made sure that it has none.
    pub(crate) fn set_view(&self, view: Arc<View>) {
        let view = WatchedView::new(view);
        let before = self.view.lock().replace(view);
        drop(before);
    }

    /// Removes the file's view: `ENOTCONN` if it has none. The caller holds `attaching`.
    pub(crate) fn detach(&self) -> Result {
        let view = self.view.lock().take().ok_or(ENOTCONN)?;
        view.detach();
        Ok(())
    }

    pub(crate) fn read(&self, position: i64, to: &mut IovIterDest<'_>) -> Result<usize> {
        let view = self.view()?;
        let done = transfer(&view, position, to.len(), false, to)?;
        view.read_bytes.add(done);
        Ok(done)
    }

    pub(crate) fn write(&self, position: i64, from: &mut IovIterSource<'_>) -> Result<usize> {
        let view = self.view()?;
        let done = transfer(&view, position, from.len(), true, from)?;
        view.written_bytes.add(done);
        Ok(done)
    }

    /// The new position. `ENXIO` where there is no data or hole to be found.
    pub(crate) fn seek(&self, current: i64, offset: i64, whence: u32) -> Result<i64> {
        let view = self.view()?;
        let window = || -> Result<Arc<Window>> { Ok(view.look().window?) };
        let position = match whence {
            bindings::SEEK_SET => Some(offset),
            bindings::SEEK_CUR => current.checked_add(offset),
            bindings::SEEK_END => i64::try_from(window()?.end())?.checked_add(offset),
            bindings::SEEK_DATA => Some(i64::try_from(seek_data(&view, &*window()?, offset)?)?),
            bindings::SEEK_HOLE => Some(i64::try_from(seek_hole(&view, &*window()?, offset)?)?),
            _ => None,
        };
        position.filter(|position| *position >= 0).ok_or(EINVAL)
    }

    /// POLLERR without a view, POLLHUP once it has ended, else POLLIN; POLLPRI for a change that
    /// the tool has not asked for.
    pub(crate) fn poll(&self, file: &File, table: &PollTable<'_>) -> u32 {
        table.register_wait(file, &self.waiters);
        let Ok(view) = self.view() else {
            return bindings::POLLERR;
        };
        // A change that cannot be followed yet wakes the waiters when it is.
        let _ = view.refresh();
        let (is_changed, has_ended) = view.events();
        let change = if is_changed { bindings::POLLPRI } else { 0 };
        change
            | if has_ended {
                bindings::POLLHUP
            } else {
                bindings::POLLIN | bindings::POLLRDNORM
            }
    }

    /// Maps the target's memory: `ENXIO` if none of it is in the view. The rest raises
    /// SIGBUS. `EAGAIN` while the host is changing the view: it is not waited for, as the
    /// process's memory is locked for writing.
    pub(crate) fn mmap(&self, area: &NewArea<'_, impl Areas>) -> Result {
        if area.flags() & flags::MAYSHARE == 0 {
            return Err(EINVAL);
        }
        let view = self.view()?;
        view.refresh()?;
        let contents = view.contents();
        let window = contents.window.clone()?;
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
        area.fill_by_faults(view.number())?;
        let mut regions = self.regions.lock();
        if regions.is_open() {
            // As in the driver that defined these calls: a child's copy would keep the region from
            // being unmapped.
            area.set_dontcopy();
        }
        regions.add_area(gpa, len)
    }

    pub(crate) fn area_opened(&self, area: &VmaRef) {
        if let Some(gpa) = file_offset(area) {
            // A part or a copy of an area that was let in.
            let _ = self.regions.lock().add_area(gpa, 0);
        }
    }

    pub(crate) fn area_closed(&self, area: &VmaRef) {
        if let Some(gpa) = file_offset(area) {
            self.regions.lock().remove_area(gpa);
        }
    }

    /// Maps one page, of any size. What is shown cannot change between looking and mapping; a
    /// change takes the pages away afterwards.
    pub(crate) fn fault(&self, fault: &Fault) -> Result<FaultResult, FaultError> {
        // An area may be older than the file's view.
        let view = self
            .view()
            .ok()
            .filter(|view| view.number() == fault.number())
            .ok_or(FaultError::Bus)?;
        let result = insert(&view, fault);
        view.faults.count(fault.order(), &result);
        result
    }
}

fn insert(view: &View, fault: &Fault) -> Result<FaultResult, FaultError> {
    view.with(|contents| {
        let window = contents.window.as_ref().map_err(|_| FaultError::Bus)?;
        if fault.is_area_writable() && !contents.is_writable() {
            return Err(FaultError::Bus);
        }
        if fault.order() > 9 && !has_1g_pages() {
            return Err(FaultError::Smaller);
        }
        let (gpa, _) = fault.place().ok_or(FaultError::Smaller)?;
        let (memory, offset) = window.find(gpa).map_err(|error| match error {
            ENOMEM => FaultError::Memory,
            _ => fault.refusal(),
        })?;
        fault.insert(memory, offset)
    })
}

/// What a step of a transfer came to.
enum Step {
    /// So many bytes of those that were wanted.
    Copied(usize, usize),
    /// The view changed meanwhile.
    Changed,
    /// The host is changing the view.
    Busy,
}

/// Copies between the target's memory from `position` on and a process's: as many bytes as lie in
/// ranges that follow each other. 0 at the end of the last range when reading, else `ENXIO` where
/// there is no memory.
fn transfer(
    view: &View,
    position: i64,
    len: usize,
    is_write: bool,
    buffer: &mut impl UserBuffer,
) -> Result<usize> {
    let start = u64::try_from(position).map_err(|_| EINVAL)?;
    let (mut done, mut changes, mut pauses) = (0, 0, 0);
    while done < len {
        match step(
            view,
            start.checked_add(done as u64).ok_or(EINVAL)?,
            len - done,
            is_write,
            buffer,
        ) {
            Ok(Step::Copied(count, wanted)) => {
                done += count;
                // The process's memory may be this file's, or answered for by another process: the
                // target's memory is not in use here while its pages are got.
                let is_short = count < wanted && !buffer.fault_in(wanted - count);
                if is_short && done == 0 {
                    return Err(EFAULT);
                }
                if is_short || wanted == 0 || is_killed() {
                    break;
                }
            }
            Ok(Step::Changed) if changes < CHANGES => changes += 1,
            Ok(Step::Busy) if done == 0 && pauses < TRIES && !is_killed() => {
                pauses += 1;
                fsleep(PAUSE);
            }
            Ok(Step::Changed | Step::Busy) if done == 0 => return Err(EAGAIN),
            Err(error) if done == 0 => return Err(error),
            Ok(Step::Changed | Step::Busy) | Err(_) => break,
        }
    }
    Ok(done)
}

/// Copies up to [`CHUNK`] bytes, as long as the process's pages are there.
fn step(
    view: &View,
    gpa: u64,
    len: usize,
    is_write: bool,
    buffer: &mut impl UserBuffer,
) -> Result<Step> {
    match view.refresh() {
        Err(EAGAIN) => return Ok(Step::Busy),
        result => result?,
    }
    let contents = view.contents();
    let window = contents.window.clone()?;
    if is_write && !contents.is_writable() {
        return Err(EACCES);
    }
    if gpa >= window.end() && !is_write {
        return Ok(Step::Copied(0, 0));
    }
    let (memory, offset) = window.find(gpa)?;
    let room = usize::try_from(memory.len().saturating_sub(offset))?;
    let wanted = len.min(CHUNK).min(room);
    let copied = memory.copy(offset, wanted, buffer, || view.is_current(&contents));
    Ok(copied.map_or(Step::Changed, |count| Step::Copied(count, wanted)))
}

/// The next data: the host knows which memory the target has never used or has freed.
fn seek_data(view: &View, window: &Window, offset: i64) -> Result<u64> {
    let mut at = u64::try_from(offset).map_err(|_| ENXIO)?;
    loop {
        at = window.first_from(at).ok_or(ENXIO)?;
        match view.host().seek(at, SEEK_DATA) {
            Ok(None) => return Err(ENXIO),
            Ok(Some(found)) if window.contains(found) => return Ok(found),
            // Between two ranges, of which there are few.
            Ok(Some(found)) => at = found,
            Err(error) if error == EOPNOTSUPP => return Ok(at),
            Err(error) => return Err(error),
        }
    }
}

/// The next hole: of the target's memory or between ranges, also the one behind the last range.
fn seek_hole(view: &View, window: &Window, offset: i64) -> Result<u64> {
    let at = u64::try_from(offset)
        .ok()
        .filter(|at| *at < window.end())
        .ok_or(ENXIO)?;
    let end = window.first_hole_from(at);
    if end == at {
        return Ok(at);
    }
    match view.host().seek(at, SEEK_HOLE) {
        Ok(found) => Ok(found.map_or(end, |found| found.min(end))),
        Err(error) if error == EOPNOTSUPP => Ok(end),
        Err(error) => Err(error),
    }
}
