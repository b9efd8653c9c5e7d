// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A view on the host: the memfds of the target's RAM, which the broker hands to this process, or
//! else copies that the broker makes.
//!
//! A thread of its own keeps the connection to the broker, so that a revoked grant ends the view at
//! any time: the thread unmaps all mappings, closes the files, and then confirms to the broker.

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

use super::backend::Backend;
use super::error::{ViewError, ViewOperation};
use super::memory::{Memory, Source};
use super::status::{Access, Event, State, Status};
use super::vectored::VectoredError;
use crate::explain;
use kvmmem_memory::Range;
use kvmmem_sys::foreign::Foreign;

/// A view by the broker of this host.
#[derive(Debug)]
pub(super) struct HostBackend {
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

impl HostBackend {
    pub(super) fn attach(
        socket: &Path,
        token: &Token,
        access: Access,
        ranges: &[Range],
    ) -> Result<Self, ViewError> {
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
        Ok(Self {
            memory,
            uuid: view.uuid.into_bytes(),
            name: view.name,
            instance,
            is_writable: view.rights == Rights::ReadWrite,
            stop,
            watcher: Mutex::new(Some(watcher)),
            process: std::process::id(),
        })
    }

    /// Ends the view, if that has not happened yet.
    fn end(&self) {
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

impl Backend for HostBackend {
    fn status(&self) -> Result<Status, ViewError> {
        let reach = self.memory.reach();
        Ok(Status {
            generation: reach.generation,
            state: reach.state,
            is_writable: self.is_writable,
            uuid: self.uuid,
            ranges: reach.ranges(),
        })
    }

    fn instance(&self) -> Result<Option<u64>, ViewError> {
        Ok(Some(self.instance.load(Ordering::Acquire)))
    }

    fn is_writable(&self) -> bool {
        self.is_writable
    }

    fn read(&self, operation: ViewOperation, gpa: u64, buf: &mut [u8]) -> Result<usize, ViewError> {
        self.memory.read(operation, gpa, buf)
    }

    fn write(&self, operation: ViewOperation, gpa: u64, bytes: &[u8]) -> Result<usize, ViewError> {
        self.memory.write(operation, gpa, bytes)
    }

    fn data_from(&self, operation: ViewOperation, gpa: u64) -> Result<Option<Range>, ViewError> {
        self.memory.reach().data_from(operation, gpa)
    }

    fn map(&self, operation: ViewOperation, range: Range) -> Result<Arc<Foreign>, ViewError> {
        self.memory.map(operation, range, self.is_writable)
    }

    fn wait(&self, timeout: Duration) -> Result<Option<Event>, ViewError> {
        Ok(self.memory.wait(timeout))
    }

    fn detach(&self) -> Result<(), ViewError> {
        self.end();
        Ok(())
    }

    fn name(&self) -> Option<&str> {
        Some(&self.name)
    }

    fn data_in(
        &self,
        operation: ViewOperation,
        range: Range,
    ) -> Result<Option<Vec<Range>>, ViewError> {
        self.memory.reach().data_in(operation, range)
    }

    fn read_vectored(&self, pieces: &mut [(u64, &mut [u8])]) -> Result<(), VectoredError> {
        self.memory.read_vectored(pieces)
    }
}

impl Drop for HostBackend {
    fn drop(&mut self) {
        self.end();
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
