// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A registered VM's connection to the broker.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::thread::JoinHandle;

use kvmmem_proto::client::{self, ClientError};
use kvmmem_proto::map::Region;
use kvmmem_proto::message::{Call, Change, Registration};

use super::cache::Cache;
use super::events::{Queue, ViewEvents};
use super::outbox::Outbox;
use super::state::{Shared, State};
use super::vcpus::{Questions, Vcpus};
use super::views::Views;
use super::{event_thread, reader, vcpu_thread};

/// A registered VM's connection to the broker. Dropping it ends the registration.
#[derive(Debug)]
pub struct VmmLink {
    pub(super) shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

impl VmmLink {
    /// Registers a VM with the broker that listens at `socket`; `files` are the memfds of its RAM,
    /// needed where the VM is introspectable and sealed with `F_SEAL_SHRINK`.
    ///
    /// # Errors
    /// Where the broker cannot be reached or refuses.
    pub fn connect(
        socket: &Path,
        registration: Registration,
        files: impl IntoIterator<Item = OwnedFd>,
    ) -> Result<Self, ClientError> {
        let connected = client::connect(socket)?;
        let answers = registration.vcpu_questions;
        let state = State {
            registration,
            first_generation: None,
            changes: 0,
            socket: None,
            cache: Cache::default(),
            views: Views::default(),
            events: Queue::default(),
            vcpus: Questions::default(),
            lost: 0,
            last_request: 0,
            waiting: HashMap::new(),
            stopped: false,
        };
        let shared = Arc::new(Shared {
            path: socket.to_owned(),
            files: files.into_iter().collect(),
            state: Mutex::new(state),
            changed: Condvar::new(),
            outbox: Outbox::default(),
        });
        let connection = reader::register(&shared, connected)?;
        let mut link = Self { shared, threads: Vec::new() };
        // A link that is dropped because of the second thread ends the first one.
        link.start("broker-link", move |shared| reader::run(shared, connection))?;
        link.start("broker-events", event_thread::run)?;
        if answers {
            link.start("broker-vcpus", vcpu_thread::run)?;
        }
        Ok(link)
    }

    fn start(
        &mut self,
        name: &str,
        run: impl FnOnce(&Shared) + Send + 'static,
    ) -> Result<(), ClientError> {
        let shared = Arc::clone(&self.shared);
        let thread = std::thread::Builder::new().name(name.into()).spawn(move || run(&shared));
        let no_thread = |source| ClientError::Local { what: "start a thread", source };
        self.threads.push(thread.map_err(no_thread)?);
        Ok(())
    }

    /// Ends the registration now, and not only when the link is dropped.
    pub fn close(&self) {
        let mut state = self.shared.lock();
        state.stopped = true;
        if let Some(socket) = state.socket.take() {
            socket.shut_down();
        }
        drop(state);
        self.shared.changed.notify_all();
    }

    /// Whether the VM is registered at this moment.
    pub fn is_connected(&self) -> bool {
        self.shared.lock().socket.is_some()
    }

    /// Sets who is told of what happens to views, and to pages that were mapped by
    /// [`VmmLink::redeem`]. Without it a revoked grant is never confirmed to the broker.
    pub fn set_events(&self, events: Weak<dyn ViewEvents>) {
        self.shared.lock().events.handler = Some(events);
        self.shared.changed.notify_all();
    }

    /// Sets what answers the broker's questions about this VM's vCPUs, where the registration
    /// promised that ([`Registration::vcpu_questions`]). Before this they are answered with an
    /// error.
    pub fn set_vcpus(&self, vcpus: Weak<dyn Vcpus>) {
        self.shared.lock().vcpus.handler = Some(vcpus);
        self.shared.changed.notify_all();
    }

    /// How many connections were lost: the numbers of grants, views and targets start anew with
    /// each.
    pub fn connection(&self) -> u64 {
        self.shared.lock().lost
    }

    /// Reports that this VM's RAM was reset, or that it is elsewhere in its files now. All who have
    /// a view of it are told.
    pub fn ram_changed(&self, regions: Vec<Region>, change: Change) {
        let mut state = self.shared.lock();
        state.registration.regions.clone_from(&regions);
        state.changes += 1;
        drop(state);
        self.shared.outbox.push(Call::RamChanged { regions, change });
        self.shared.flush();
    }
}

impl Drop for VmmLink {
    fn drop(&mut self) {
        self.close();
        for thread in self.threads.drain(..) {
            // The handler of events may have held the last reference to the link.
            if thread.thread().id() != std::thread::current().id() {
                // The threads do not panic; were one to, there would be nothing left to end.
                let _ = thread.join();
            }
        }
    }
}
