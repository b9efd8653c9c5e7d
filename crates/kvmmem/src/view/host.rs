// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A view on the host: the memfds of the target's RAM, which the broker hands to this process, or
//! else copies that the broker makes.
//!
//! A thread of its own keeps the connection to the broker, so that a grant that is taken back ends
//! the view whatever the tool is doing: what is mapped is replaced by nothing, the files are
//! closed, and then the broker is told.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvmmem_proto::scope::{Rights, Span};

use crate::host::{ClientError, HostEvent, HostLink};
use kvmmem_kvmi::token::Token;
use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use super::mapping::{Keeps, Mapping};
use super::memory::{Memory, Source};
use super::vectored::VectoredError;
use super::{Access, Event, State, Status, ViewError, ViewOperation};
use crate::explain;
use kvmmem_memory::Range;

/// A view of which the [`View`](super::View) and the mappings share the ownership.
#[derive(Debug)]
pub(super) struct HostView {
    memory: Arc<Memory>,
    uuid: [u8; 16],
    name: String,
    /// The generation of the target's RAM as the broker has it.
    instance: Arc<AtomicU64>,
    is_writable: bool,
    /// Written to, it ends the watcher.
    stop: Arc<OwnedFd>,
    watcher: Mutex<Option<JoinHandle<()>>>,
    /// The process that attached: one that is forked from it has no watcher.
    process: u32,
}

impl HostView {
    pub(super) fn attach(
        socket: &Path,
        token: &Token,
        access: Access,
        ranges: &[Range],
    ) -> Result<Arc<Self>, ViewError> {
        let refused = |source: ClientError| ViewError::AttachHost {
            socket: socket.to_owned(),
            remedy: explain::host(&source),
            source: Box::new(source),
        };
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map(Arc::new);
        let stop = stop.map_err(|errno| ViewError::Watch(errno.into()))?;
        let reaching: Vec<Span> =
            ranges.iter().map(|range| Span { gpa: range.gpa, len: range.len }).collect();
        let attached =
            HostLink::attach_reaching(socket, token, access == Access::ReadOnly, &reaching);
        let (link, view) = attached.map_err(refused)?;
        let source = match view.copier {
            Some(copier) => Source::Copies(Arc::new(copier)),
            None => Source::Files(view.files.into()),
        };
        let instance = Arc::new(AtomicU64::new(view.generation));
        let memory = Arc::new(Memory::new(view.generation, view.regions, source));
        let watcher = std::thread::Builder::new()
            .name("kvmmem-view".into())
            .spawn({
                let (memory, instance, stop) =
                    (Arc::clone(&memory), Arc::clone(&instance), Arc::clone(&stop));
                move || watch(&memory, &instance, link, &stop)
            })
            .map_err(ViewError::Watch)?;
        Ok(Arc::new(Self {
            memory,
            uuid: view.identity.uuid.into_bytes(),
            name: view.identity.name,
            instance,
            is_writable: view.rights == Rights::ReadWrite,
            stop,
            watcher: Mutex::new(Some(watcher)),
            process: std::process::id(),
        }))
    }

    pub(super) fn status(&self) -> Status {
        let reach = self.memory.reach();
        Status {
            generation: reach.generation,
            state: reach.state,
            is_writable: self.is_writable,
            uuid: self.uuid,
            ranges: reach.ranges(),
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn instance(&self) -> u64 {
        self.instance.load(Ordering::Acquire)
    }

    pub(super) fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), ViewError> {
        self.memory.read_all(ViewOperation::Read { gpa, len: buf.len() }, gpa, buf)
    }

    pub(super) fn read_vectored(
        &self,
        pieces: &mut [(u64, &mut [u8])],
    ) -> Result<(), VectoredError> {
        self.memory.read_vectored(pieces)
    }

    pub(super) fn write_at(&self, gpa: u64, bytes: &[u8]) -> Result<(), ViewError> {
        let operation = ViewOperation::Write { gpa, len: bytes.len() };
        if !self.is_writable {
            return Err(ViewError::ReadOnly { operation });
        }
        let (mut gpa, mut rest) = (gpa, bytes);
        while !rest.is_empty() {
            let count = self.memory.write(operation, gpa, rest)?;
            gpa = gpa.saturating_add(count as u64);
            rest = rest.get(count..).unwrap_or_default();
        }
        Ok(())
    }

    pub(super) fn data_from(&self, gpa: u64) -> Result<Option<Range>, ViewError> {
        self.memory.data_from(ViewOperation::Seek { gpa }, gpa)
    }

    pub(super) fn data_in(&self, range: Range) -> Result<Option<Vec<Range>>, ViewError> {
        self.memory.data_in(ViewOperation::Seek { gpa: range.gpa }, range)
    }

    pub(super) fn map(self: &Arc<Self>, range: Range) -> Result<Mapping, ViewError> {
        let operation = ViewOperation::Map { gpa: range.gpa, len: range.len };
        if !range.is_pages() {
            return Err(ViewError::Pages { operation });
        }
        let memory = self.memory.map(operation, range, self.is_writable)?;
        Ok(Mapping::new(range.gpa, memory, Some(Keeps::View(Arc::clone(self)))))
    }

    pub(super) fn wait(&self, timeout: Duration) -> Option<Event> {
        self.memory.wait(timeout)
    }

    /// Ends the view, if that has not happened yet.
    pub(super) fn detach(&self) {
        if std::process::id() != self.process {
            return;
        }
        // It fails only where the counter is full.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(watcher) = self.watcher.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // The thread does not panic; were it to, there would be nothing left to end.
            let _ = watcher.join();
        }
    }
}

impl Drop for HostView {
    fn drop(&mut self) {
        self.detach();
    }
}

/// Does what the broker says until the view ends.
fn watch(memory: &Memory, instance: &AtomicU64, mut link: HostLink, stop: &OwnedFd) {
    let state = loop {
        let link_fd = link.as_fd();
        let mut files = [PollFd::new(&link_fd, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut files, None) {
            Ok(_) if files.iter().skip(1).any(|stop| !stop.revents().is_empty()) => {
                break State::Gone;
            }
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            // Of a right whose end it cannot hear of, this process makes no use.
            Err(_) => break State::Gone,
        }
        match link.wait(Duration::ZERO) {
            Ok(None) => {}
            Ok(Some(HostEvent::Changed { generation, regions })) => {
                // First: a tool that does not see the change yet may see the new number, but not
                // the other way around.
                instance.store(generation, Ordering::Release);
                memory.change(generation, regions);
            }
            Ok(Some(HostEvent::Revoked)) => break State::Revoked,
            Ok(Some(HostEvent::Gone)) | Err(_) => break State::Gone,
        }
    };
    if memory.end(state) {
        link.confirm();
    } else {
        // Closing the link would confirm. The operator is told that this process has not, and can
        // end it.
        std::mem::forget(link);
    }
}
