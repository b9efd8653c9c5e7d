// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A view in a virtual machine: an attached file of `/dev/kvmmem`, and where the host shows views
//! as PCI devices, the connection to the host that keeps them plugged in.

use std::os::fd::AsFd;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use kvmmem_abi::ioctl::MapMemToken;
use kvmmem_abi::native::{
    ATTACH_READ_ONLY, Attach, FEATURE_DEVICES, FEATURE_VIEWS, RIGHT_WRITE, STATE_GONE, STATE_OPEN,
    Stats, VERSION,
};
use kvmmem_kvmi::token::Token;
use kvmmem_sys::device::OpenError;
use kvmmem_sys::foreign::Foreign;
use kvmmem_sys::view::ViewFile;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, pread, pwrite, retry_on_intr};

use super::backend::Backend;
use super::error::{ViewError, ViewOperation};
use super::guest_endpoint::{GuestConnection, GuestEndpointError};
use super::status::{Access, Event, State, Status};
use crate::explain;
use kvmmem_memory::range::{Range, first_hole, next_range};
use kvmmem_proto::guest::MappedBy;
use kvmmem_proto::message::Caller;

/// The longest that [`DeviceView::wait`] sleeps at once: `status`, called by another thread, takes
/// the event away for which `poll` would wake this one.
const SLEEP_LIMIT: Duration = Duration::from_millis(100);

/// How long the host may take to change a view, and how often that is looked at.
const BUSY_LIMIT: Duration = Duration::from_secs(5);
const BUSY_PAUSE: Duration = Duration::from_millis(2);

#[derive(Debug)]
pub(super) struct DeviceView {
    file: ViewFile,
    is_writable: bool,
    /// The generation of which [`DeviceView::wait`] told last.
    told: AtomicU64,
    /// The connection to the host; `None` where a hypercall opened the view. Dropped after the
    /// file.
    guest: Option<GuestConnection>,
    /// The state since the host ended the connection without having ended the view.
    lost: OnceLock<Status>,
}

impl DeviceView {
    pub(super) fn attach(path: &Path, token: &Token, access: Access) -> Result<Self, ViewError> {
        let file = ViewFile::open(path).map_err(|source| {
            let remedy = match &source {
                OpenError::Open(error) => explain::open(error),
                OpenError::NotMisc => "",
            };
            ViewError::Open { path: path.to_owned(), remedy, source }
        })?;
        let info =
            file.info().map_err(|source| ViewError::Info { path: path.to_owned(), source })?;
        if info.version != VERSION {
            return Err(ViewError::Version { path: path.to_owned(), found: info.version });
        }
        if info.features & FEATURE_VIEWS == 0 {
            return Err(ViewError::NoViews { path: path.to_owned() });
        }
        let flags = match access {
            Access::ReadOnly => ATTACH_READ_ONLY,
            Access::Granted => 0,
        };
        let guest = match info.features & FEATURE_DEVICES {
            0 => None,
            _ => {
                let (read_only, caller) = (access == Access::ReadOnly, Caller::this_process());
                let guest = GuestConnection::open(token, read_only, MappedBy::Module, caller);
                Some(guest.map_err(|source| ViewError::GuestEndpoint(Box::new(source)))?)
            }
        };
        let token = guest.as_ref().map_or(token, |guest| guest.ticket());
        let token = MapMemToken { token: token.words() };
        let attached = match &guest {
            // A ticket stays good while the host is changing the view.
            Some(_) => until_settled(|| file.attach(Attach { token, flags, reserved: 0 })),
            None => file.attach(Attach { token, flags, reserved: 0 }),
        };
        attached.map_err(|source| match source {
            Errno::NOENT if guest.is_some() => {
                ViewError::GuestEndpoint(Box::new(GuestEndpointError::Lost))
            }
            source => ViewError::Attach { path: path.to_owned(), source },
        })?;
        let mut view = Self {
            file,
            is_writable: false,
            told: AtomicU64::new(0),
            guest,
            lost: OnceLock::new(),
        };
        let status = view.status()?;
        view.is_writable = status.is_writable;
        *view.told.get_mut() = status.generation;
        Ok(view)
    }

    /// Ends the view because the broker has exited: its grant could not be revoked any more.
    fn lose(&self, status: Status) -> Status {
        let generation = status.generation.saturating_add(1);
        let lost = Status { generation, state: State::Gone, ranges: Vec::new(), ..status };
        let lost = self.lost.get_or_init(|| lost).clone();
        if let Err(error) = self.file.detach() {
            tracing::debug!(%error, "the view that was lost had been detached");
        }
        lost
    }

    /// What an errno of the driver means for something done at `gpa`.
    fn error(&self, operation: ViewOperation, gpa: u64, source: Errno) -> ViewError {
        match source {
            Errno::NOTCONN if self.lost.get().is_some() => ViewError::Gone { operation },
            source => ViewError::of(operation, gpa, source),
        }
    }

    /// How many bytes the driver has copied at `gpa`.
    fn copied(
        &self,
        operation: ViewOperation,
        gpa: u64,
        result: Result<usize, Errno>,
    ) -> Result<usize, ViewError> {
        match result {
            // After the last range.
            Ok(0) => Err(ViewError::Hole { operation, gpa }),
            Ok(count) => Ok(count),
            Err(source) => Err(self.error(operation, gpa, source)),
        }
    }

    /// What has happened since this was asked last.
    fn event(&self) -> Result<Option<Event>, ViewError> {
        let status = self.status()?;
        let told = self.told.fetch_max(status.generation, Ordering::Relaxed);
        Ok(match status.state {
            State::Revoked => Some(Event::Revoked),
            State::Gone => Some(Event::Gone),
            State::Open => (status.generation > told).then_some(Event::Changed),
        })
    }
}

impl Backend for DeviceView {
    fn status(&self) -> Result<Status, ViewError> {
        let operation = ViewOperation::Status;
        if let Some(status) = self.lost.get() {
            return Ok(status.clone());
        }
        // Looked at first: the host ends the view, and then the connection.
        let is_shut = self.guest.as_ref().is_some_and(|guest| guest.is_shut());
        let (status, ranges) =
            self.file.ranges().map_err(|source| ViewError::System { operation, source })?;
        let state = match status.state {
            STATE_OPEN => State::Open,
            STATE_GONE => State::Gone,
            // Also a state that a later driver may add: in none of them is the view open.
            _ => State::Revoked,
        };
        let status = Status {
            generation: status.generation,
            state,
            is_writable: status.rights & RIGHT_WRITE != 0,
            uuid: status.uuid,
            ranges: ranges
                .into_iter()
                .map(|range| Range { gpa: range.gpa, len: range.len })
                .collect(),
        };
        Ok(if is_shut && state == State::Open { self.lose(status) } else { status })
    }

    fn instance(&self) -> Result<Option<u64>, ViewError> {
        let operation = ViewOperation::Status;
        let stats = self.file.stats().map_err(|source| ViewError::System { operation, source })?;
        Ok((stats.instance != 0).then_some(stats.instance))
    }

    fn is_writable(&self) -> bool {
        self.is_writable
    }

    fn read(&self, operation: ViewOperation, gpa: u64, buf: &mut [u8]) -> Result<usize, ViewError> {
        check_offset(operation, gpa)?;
        self.copied(operation, gpa, retry_on_intr(|| pread(&self.file, &mut *buf, gpa)))
    }

    fn write(&self, operation: ViewOperation, gpa: u64, bytes: &[u8]) -> Result<usize, ViewError> {
        check_offset(operation, gpa)?;
        self.copied(operation, gpa, retry_on_intr(|| pwrite(&self.file, bytes, gpa)))
    }

    fn data_from(&self, operation: ViewOperation, gpa: u64) -> Result<Option<Range>, ViewError> {
        if check_offset(operation, gpa).is_err() {
            return Ok(None);
        }
        // Nothing else uses the file's position.
        let start = match seek(&self.file, SeekFrom::Data(gpa)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(None),
            Err(Errno::INVAL | Errno::SPIPE | Errno::OPNOTSUPP) => {
                return Ok(next_range(&self.status()?.ranges, gpa));
            }
            Err(source) => return Err(self.error(operation, gpa, source)),
        };
        match seek(&self.file, SeekFrom::Hole(start)) {
            Ok(end) if end > start => Ok(Some(Range { gpa: start, len: end - start })),
            // The data has gone since; what is left of the range is safe to say.
            Ok(_) | Err(Errno::NXIO) => Ok(next_range(&self.status()?.ranges, start)),
            Err(source) => Err(self.error(operation, start, source)),
        }
    }

    fn map(&self, operation: ViewOperation, range: Range) -> Result<Arc<Foreign>, ViewError> {
        let status = self.status()?;
        status.state.check(operation)?;
        if let Some(gpa) = first_hole(&status.ranges, range) {
            return Err(ViewError::Hole { operation, gpa });
        }
        let memory =
            Foreign::reserve(range.len, range.gpa, self.is_writable, kvmmem_proto::map::PAGE_SIZE)
                .map_err(|source| ViewError::System { operation, source })?;
        until_settled(|| memory.place(0, range.len, self.file.as_fd(), range.gpa))
            .map_err(|source| self.error(operation, range.gpa, source))?;
        Ok(Arc::new(memory))
    }

    fn wait(&self, timeout: Duration) -> Result<Option<Event>, ViewError> {
        let operation = ViewOperation::Wait;
        let deadline = Instant::now().checked_add(timeout);
        loop {
            if let Some(event) = self.event()? {
                return Ok(Some(event));
            }
            let left =
                deadline.map_or(SLEEP_LIMIT, |end| end.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return Ok(None);
            }
            let mut files = vec![PollFd::new(&self.file, PollFlags::PRI)];
            files.extend(self.guest.as_ref().map(|guest| PollFd::new(guest, PollFlags::IN)));
            let sleep = Timespec::try_from(left.min(SLEEP_LIMIT)).ok();
            match poll(&mut files, sleep.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(source) => return Err(ViewError::System { operation, source }),
            }
        }
    }

    fn stats(&self) -> Result<Option<Stats>, ViewError> {
        let operation = ViewOperation::Stats;
        let stats = self.file.stats().map_err(|source| ViewError::System { operation, source })?;
        Ok(Some(stats))
    }

    fn detach(&self) -> Result<(), ViewError> {
        let operation = ViewOperation::Detach;
        self.file.detach().map_err(|source| ViewError::System { operation, source })?;
        // The host ends the view with this connection, which mappings and children keep open.
        if let Some(guest) = &self.guest {
            guest.shut();
        }
        Ok(())
    }
}

/// Tries again for a while what the driver refuses with EAGAIN because the host is changing the
/// view at this moment.
fn until_settled<T>(mut call: impl FnMut() -> Result<T, Errno>) -> Result<T, Errno> {
    let deadline = Instant::now() + BUSY_LIMIT;
    loop {
        match call() {
            Err(Errno::AGAIN) if Instant::now() < deadline => std::thread::sleep(BUSY_PAUSE),
            result => return result,
        }
    }
}

/// Offsets of files are signed; there is no memory behind.
fn check_offset(operation: ViewOperation, gpa: u64) -> Result<(), ViewError> {
    i64::try_from(gpa).map(drop).map_err(|_| ViewError::Hole { operation, gpa })
}
