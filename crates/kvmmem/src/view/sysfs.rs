// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A view in a virtual machine under a stock QEMU without the module: the windows are PCI devices,
//! and this process maps them by their files in `/sys`.
//!
//! It mirrors the driver (`kernel/{devices,slot,attachment}.rs`) as far as a process can. What it
//! cannot is to take a mapping away when a device is unplugged, so:
//!
//! - **Each access is proven** ([`Shared::prove`]): the descriptor page says before and afterwards
//!   that the view is open, and the window's file says afterwards that the device is there.
//! - **The view's end is acknowledged** ([`Shared::end`]): the host unplugs the devices when this
//!   process has removed its mappings and said so. A port whose view was not acknowledged is not
//!   used again until the machine is reset.
//!
//! Only the process that attached may use the view: a child that is forked from it has none of the
//! mappings.

mod bar;
pub(super) mod discover;
mod function;
mod head;
mod shared;
#[cfg(test)]
mod tests;

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use kvmmem_kvmi::token::Token;
use kvmmem_memory::range::{Range, first_hole, next_range};
use kvmmem_proto::guest::MappedBy;
use kvmmem_proto::message::Caller;
use kvmmem_sys::foreign::Foreign;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use self::discover::Bus;
use self::shared::{Follow, PROOF_LIMIT, Shared};
use super::backend::Backend;
use super::error::{ViewError, ViewOperation};
use super::guest_endpoint::GuestConnection;
use super::status::{Access, Event, State, Status};
use discover::SysfsError;

/// Where the kernel shows PCI devices.
const DEVICES: &str = "/sys/bus/pci/devices";

/// How long the kernel may take to show devices that were plugged in: 6 s with native PCIe hot
/// plug.
const LIMIT: Duration = Duration::from_secs(12);

/// How often the descriptor page is looked at: the host cannot signal a change.
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

/// A view whose devices this process has mapped.
#[derive(Debug)]
pub(super) struct SysfsView {
    shared: Arc<Shared>,
    is_writable: bool,
    /// Written to, it ends the watcher.
    stop: Arc<OwnedFd>,
    watcher: Mutex<Option<JoinHandle<()>>>,
}

/// Whether this is a virtual machine in which views may come as PCI devices.
pub(super) fn is_possible() -> bool {
    let is_guest = |cid| cid > vsock::VMADDR_CID_HOST && cid < vsock::VMADDR_CID_ANY;
    vsock::get_local_cid().is_ok_and(is_guest) && Path::new(DEVICES).exists()
}

impl SysfsView {
    pub(super) fn attach(
        token: &Token,
        access: Access,
        caller: Caller,
    ) -> Result<Arc<Self>, ViewError> {
        let read_only = access == Access::ReadOnly;
        let connection = GuestConnection::open(token, read_only, MappedBy::Library, caller);
        let connection = connection.map_err(|source| ViewError::GuestEndpoint(Box::new(source)))?;
        let bus = Bus { folder: DEVICES.as_ref(), is_alive: bar::is_alive, limit: LIMIT };
        Self::open(&bus, connection, access).map_err(|source| ViewError::Sysfs(Box::new(source)))
    }

    /// Takes up the devices of a view that the host has opened.
    fn open(
        bus: &Bus<'_>,
        connection: GuestConnection,
        access: Access,
    ) -> Result<Arc<Self>, SysfsError> {
        let digest = Sha256::digest(*Zeroizing::new(connection.ticket().to_bytes())).into();
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map(Arc::new);
        let stop = stop.map_err(|errno| SysfsError::Watch(errno.into()))?;
        // Dropped last, also where this fails: its end acknowledges the view's.
        let connection = Arc::new(connection);
        let (devices, snapshot) = bus.find(&digest, access == Access::Granted)?;
        let shared = Arc::new(Shared::new(devices, snapshot));
        // Now the host knows that all is here, and no other process may take it.
        shared.acknowledge();
        let view = Arc::new(Self {
            is_writable: shared.is_writable(),
            shared: Arc::clone(&shared),
            stop: Arc::clone(&stop),
            watcher: Mutex::default(),
        });
        let watcher = std::thread::Builder::new()
            .name("kvmmem-view".into())
            .spawn({
                let connection = Arc::clone(&connection);
                move || watch(&shared, connection, &stop)
            })
            .map_err(SysfsError::Watch)?;
        *view.watcher.lock().unwrap_or_else(PoisonError::into_inner) = Some(watcher);
        Ok(view)
    }

    /// Closes the view: nothing of it is mapped here any more, and the host knows.
    fn end(&self) {
        if !self.shared.is_own_process() {
            return;
        }
        let watcher = self.watcher.lock().unwrap_or_else(PoisonError::into_inner).take();
        // It fails only where the counter is full, and then the watcher wakes as well.
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(watcher) = watcher {
            let _ = watcher.join();
        }
        self.shared.end(State::Gone, None);
    }
}

impl Backend for SysfsView {
    fn status(&self) -> Result<Status, ViewError> {
        Ok(self.shared.status())
    }

    fn instance(&self) -> Result<Option<u64>, ViewError> {
        Ok(self.shared.instance())
    }

    fn is_writable(&self) -> bool {
        self.is_writable
    }

    fn read(&self, operation: ViewOperation, gpa: u64, buf: &mut [u8]) -> Result<usize, ViewError> {
        self.shared.read(gpa, buf).map_err(|error| error.of(operation, gpa))
    }

    fn write(&self, operation: ViewOperation, gpa: u64, bytes: &[u8]) -> Result<usize, ViewError> {
        self.shared.write(gpa, bytes).map_err(|error| error.of(operation, gpa))
    }

    fn data_from(&self, operation: ViewOperation, gpa: u64) -> Result<Option<Range>, ViewError> {
        let status = self.shared.status();
        status.state.check(operation)?;
        Ok(next_range(&status.ranges, gpa))
    }

    fn map(&self, operation: ViewOperation, range: Range) -> Result<Arc<Foreign>, ViewError> {
        let status = self.shared.status();
        status.state.check(operation)?;
        if let Some(gpa) = first_hole(&status.ranges, range) {
            return Err(ViewError::Hole { operation, gpa });
        }
        self.shared.map(range).map_err(|error| error.of(operation, range.gpa))
    }

    fn wait(&self, timeout: Duration) -> Result<Option<Event>, ViewError> {
        Ok(self.shared.wait(timeout))
    }

    fn detach(&self) -> Result<(), ViewError> {
        self.end();
        Ok(())
    }

    fn proof_limit(&self) -> Option<usize> {
        Some(PROOF_LIMIT)
    }

    fn prove(&self, gpa: u64, len: u64, access: &mut dyn FnMut()) -> bool {
        self.shared.prove(gpa, len, |_| access()).is_ok()
    }
}

impl Drop for SysfsView {
    fn drop(&mut self) {
        self.end();
    }
}

/// Follows the host until the view ends; the connection ends then, too, and with it what is plugged
/// in.
fn watch(shared: &Shared, connection: Arc<GuestConnection>, stop: &OwnedFd) {
    while shared.follow() == Follow::Open {
        // Looked at after the page: the host ends the view, and then the connection.
        if connection.is_shut() {
            break;
        }
        let mut files = [
            PollFd::new(stop, PollFlags::IN),
            PollFd::from_borrowed_fd(connection.as_fd(), PollFlags::IN | PollFlags::RDHUP),
        ];
        match poll(&mut files, Some(&LOOK)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => {
                tracing::error!(%error, "cannot watch a view: it is closed");
                break;
            }
        }
        let [stopped, _] = &files;
        if !stopped.revents().is_empty() {
            break;
        }
    }
    // It has ended already, but where this is its end.
    shared.end(State::Gone, None);
    if shared.is_released() {
        connection.shut();
    } else {
        // The kernel closes it when this process ends, and all of its mappings with it.
        std::mem::forget(connection);
    }
}
