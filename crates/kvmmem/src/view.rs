// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A view: the memory of one virtual machine, as far as a token allows, open until it is detached
//! or taken back.
//!
//! # How a view is opened
//!
//! | where | by |
//! |---|---|
//! | in a virtual machine of `kvmmem vm` | the device alone: its driver passes the token on by hypercall |
//! | in one under a stock QEMU | the host's *guest endpoint* first, which is at vsock context id 2, port 27510 (or `$KVMMEM_GUEST_PORT`): the host plugs the view's memory in as PCI devices; then the device, whose driver has found them |
//! | on the host | the broker's socket |
//!
//! Which of the first two it is, the driver says (`FEATURE_DEVICES` of `kvmmem-abi`). The
//! connection to the guest endpoint is kept as long as the [`View`] or any [`Mapping`] of it, and
//! its end is the view's: the host then unplugs the devices, however the process ended. If it is
//! the host's service that goes, [`View::wait`] and [`View::status`] tell that the view is
//! [gone](State::Gone), as nobody could take it back any more.
//!
//! # Signals
//!
//! A page that goes away raises SIGBUS in whoever reads it through a mapping. [`Mapping`]'s methods
//! make an error of it: the first mapping, or the first [`View::read_vectored`] on the host,
//! installs a handler of SIGBUS for the process, which knows these methods' accesses and passes
//! every other SIGBUS on to the handler that was there before, or to the default action. So install
//! other handlers before, or let them pass on what they do not know; and do not block SIGBUS in a
//! thread that uses mappings (its first use unblocks it).
//!
//! # Fork and exec
//!
//! In a virtual machine a view belongs to its open file: a forked child shares it, and it ends for
//! both at once. On the host only the process that attached hears of the end: a child must not use
//! what it inherits. `exec` ends both.

mod device;
mod error;
mod guest_endpoint;
mod host;
mod mapping;
mod memory;
mod reader;
mod vectored;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use kvmmem_kvmi::token::Token;

use crate::device::default_path;
use device::DeviceView;
pub use error::{ViewError, ViewOperation};
pub use guest_endpoint::{GUEST_PORT_VARIABLE, GuestEndpointError, check_guest_endpoint};
use host::HostView;
pub use kvmmem_abi::native::Stats;
pub use kvmmem_memory::Range;
pub use mapping::{Mapping, MappingError};
pub use vectored::VectoredError;

/// Environment variable with the path of the broker's socket.
pub const SOCKET_VARIABLE: &str = "KVMMEM_BROKER";

/// Where kvmmemd, the host's broker, listens unless it is told otherwise.
pub const DEFAULT_SOCKET: &str = "/run/kvmmem/kvmmemd.sock";

/// What a view is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading alone, whatever the grant allows.
    ReadOnly,
    /// All that the grant allows.
    Granted,
}

/// Whether a view can be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It can.
    Open,
    /// No more: its grant was taken back.
    Revoked,
    /// No more: the target, or the host's service, is gone.
    Gone,
}

/// What has happened to a view.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The target was reset or its memory map has changed: see [`View::status`].
    Changed,
    /// The grant was taken back; the view has ended.
    Revoked,
    /// The target, or the host's service, is gone; the view has ended.
    Gone,
}

/// A view's state.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// Grows with each change of the view.
    pub generation: u64,
    /// Whether it can be used.
    pub state: State,
    /// Whether the target's memory may be written.
    pub is_writable: bool,
    /// The target's UUID, in the order in which it is printed.
    pub uuid: [u8; 16],
    /// The memory that can be reached: disjoint, in pages, ascending.
    pub ranges: Vec<Range>,
}

/// The memory of one virtual machine. A closed view's [`Mapping`]s keep it open.
///
/// In a virtual machine it is a file of `/dev/kvmmem`, on the host a connection to the broker (see
/// [`crate::view`]). All methods may be called by many threads at once.
#[derive(Debug)]
pub struct View {
    backend: Backend,
}

#[derive(Debug)]
enum Backend {
    Device(DeviceView),
    Host(Arc<HostView>),
}

impl View {
    /// Opens a view of the virtual machine that `token` names, which is used up: by the device
    /// where there is one (at `$KVMMEM_DEVICE`, or else [`crate::device::DEFAULT_PATH`]), else
    /// by this host's broker (at `$KVMMEM_BROKER`, or else [`DEFAULT_SOCKET`]).
    ///
    /// # Errors
    /// [`ViewError`], with what to do about it.
    pub fn attach(token: &Token, access: Access) -> Result<Self, ViewError> {
        Self::attach_reaching(token, access, &[])
    }

    /// As [`View::attach`], for a tool that wants to reach `ranges`. On the host the broker refuses
    /// a view that would have no memory in one of the first 64 of them, and the token is not
    /// used. In a virtual machine the driver cannot ask before it uses the token: there
    /// `ranges` are not looked at. So look at [`View::ranges`] in any case.
    ///
    /// # Errors
    /// [`ViewError`], with what to do about it.
    pub fn attach_reaching(
        token: &Token,
        access: Access,
        ranges: &[Range],
    ) -> Result<Self, ViewError> {
        let (device, socket) = (default_path(), default_socket());
        if device.exists() {
            Self::attach_device(&device, token, access)
        } else if socket.exists() {
            Self::attach_host_reaching(&socket, token, access, ranges)
        } else {
            Err(ViewError::Nowhere { device, socket })
        }
    }

    /// Opens a view by the device at `path`, after having asked the host's guest endpoint for it
    /// where the driver says that views come as PCI devices. The host has 15 s for that.
    ///
    /// # Errors
    /// [`ViewError`], with what to do about it.
    pub fn attach_device(path: &Path, token: &Token, access: Access) -> Result<Self, ViewError> {
        Ok(Self { backend: Backend::Device(DeviceView::attach(path, token, access)?) })
    }

    /// Opens a view by the broker that listens at `socket` on this host.
    ///
    /// # Errors
    /// [`ViewError`], with what to do about it.
    pub fn attach_host(socket: &Path, token: &Token, access: Access) -> Result<Self, ViewError> {
        Self::attach_host_reaching(socket, token, access, &[])
    }

    /// As [`View::attach_reaching`] on the host, by the broker that listens at `socket`.
    ///
    /// # Errors
    /// [`ViewError`], with what to do about it.
    pub fn attach_host_reaching(
        socket: &Path,
        token: &Token,
        access: Access,
        ranges: &[Range],
    ) -> Result<Self, ViewError> {
        Ok(Self { backend: Backend::Host(HostView::attach(socket, token, access, ranges)?) })
    }

    /// The view's state and ranges; works as well when it has ended.
    ///
    /// # Errors
    /// [`ViewError::System`].
    pub fn status(&self) -> Result<Status, ViewError> {
        match &self.backend {
            Backend::Device(view) => view.status(),
            Backend::Host(view) => Ok(view.status()),
        }
    }

    /// The target's name. A virtual machine does not know it.
    pub fn name(&self) -> Option<&str> {
        match &self.backend {
            Backend::Device(_) => None,
            Backend::Host(view) => Some(view.name()).filter(|name| !name.is_empty()),
        }
    }

    /// Identifies one run of the target: the number is the same for all views of it, in guests and
    /// on the host, until the target is reset, its RAM changes or its VMM ends; no other target
    /// has it. `None` where the host or the driver does not say.
    ///
    /// # Errors
    /// [`ViewError::System`].
    pub fn instance(&self) -> Result<Option<u64>, ViewError> {
        match &self.backend {
            Backend::Device(view) => view.instance(),
            Backend::Host(view) => Ok(Some(view.instance())),
        }
    }

    /// The memory that can be reached: disjoint, in pages, ascending. A view that has ended has
    /// none.
    ///
    /// # Errors
    /// As [`View::status`].
    pub fn ranges(&self) -> Result<Vec<Range>, ViewError> {
        Ok(self.status()?.ranges)
    }

    /// Fills `buf` from guest-physical address `gpa` on.
    ///
    /// # Errors
    /// [`ViewError::Hole`] with the first address that has no memory or is not granted,
    /// [`ViewError::Revoked`], [`ViewError::Gone`]. Some of `buf` may have been filled then.
    pub fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), ViewError> {
        match &self.backend {
            Backend::Device(view) => view.read_at(gpa, buf),
            Backend::Host(view) => view.read_at(gpa, buf),
        }
    }

    /// Fills each piece's bytes from its guest-physical address on, in order, as [`View::read_at`]
    /// does for one. Pieces may have any length and may overlap in the target.
    ///
    /// On the host this is the fast way to read many small pieces. Pages that are read again and
    /// again are read without system calls, through a mapping that the first call makes (see
    /// [`crate::view`] on signals). Where the target's RAM is private, the broker copies many
    /// pieces at a time. In a virtual machine it is a `pread` for each piece.
    ///
    /// ```no_run
    /// # fn read(view: &kvmmem::View) -> Result<(), kvmmem::VectoredError> {
    /// let (mut tables, mut tasks) = ([0; 4096], [0; 512]);
    /// view.read_vectored(&mut [(0x20_0000, &mut tables[..]), (0x41_3000, &mut tasks[..])])?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`VectoredError`] with the first piece that could not be filled, all before it are, and why,
    /// as for [`View::read_at`]. Pieces after it may have been filled or not.
    pub fn read_vectored(&self, pieces: &mut [(u64, &mut [u8])]) -> Result<(), VectoredError> {
        match &self.backend {
            Backend::Device(view) => view.read_vectored(pieces),
            Backend::Host(view) => view.read_vectored(pieces),
        }
    }

    /// Writes `bytes` to guest-physical address `gpa` on.
    ///
    /// # Errors
    /// As [`View::read_at`], and [`ViewError::ReadOnly`]. Some of `bytes` may have been written
    /// then.
    pub fn write_at(&self, gpa: u64, bytes: &[u8]) -> Result<(), ViewError> {
        match &self.backend {
            Backend::Device(view) => view.write_at(gpa, bytes),
            Backend::Host(view) => view.write_at(gpa, bytes),
        }
    }

    /// The next stretch of memory at `gpa` or behind it that holds data, `None` where there is no
    /// more. What lies between has no memory, is not granted, or was never written or given
    /// back by the target: then it reads as zeros, and reading it through a mapping may make
    /// the host allocate it.
    ///
    /// Where the host cannot tell, or the target's RAM is private to its VMM, all memory counts as
    /// data.
    ///
    /// # Errors
    /// [`ViewError::Revoked`], [`ViewError::Gone`].
    pub fn data_from(&self, gpa: u64) -> Result<Option<Range>, ViewError> {
        match &self.backend {
            Backend::Device(view) => view.data_from(gpa),
            Backend::Host(view) => view.data_from(gpa),
        }
    }

    /// The parts of `range`, in pages, that hold data, where this can be told without looking
    /// beyond it, so that many threads can share the work; `None` where it cannot: use
    /// [`View::data_from`].
    ///
    /// # Errors
    /// [`ViewError::Revoked`], [`ViewError::Gone`].
    pub fn data_in(&self, range: Range) -> Result<Option<Vec<Range>>, ViewError> {
        match &self.backend {
            Backend::Device(_) => Ok(None),
            Backend::Host(view) => view.data_in(range),
        }
    }

    /// Maps `range`, which is made of pages, into this process. Nothing is copied; the target's
    /// pages appear as they are accessed, and the target's writes with them.
    ///
    /// # Errors
    /// [`ViewError::Pages`] for a range that is not made of pages; [`ViewError::Hole`],
    /// [`ViewError::Revoked`], [`ViewError::Gone`]; [`ViewError::Private`] where the target's
    /// RAM can only be copied.
    pub fn map(&self, range: Range) -> Result<Mapping, ViewError> {
        match &self.backend {
            Backend::Device(view) => view.map(range),
            Backend::Host(view) => view.map(range),
        }
    }

    /// Waits for something to happen to the view, at most `timeout`. An end of the view is told by
    /// every call.
    ///
    /// # Errors
    /// [`ViewError::System`].
    pub fn wait(&self, timeout: Duration) -> Result<Option<Event>, ViewError> {
        match &self.backend {
            Backend::Device(view) => view.wait(timeout),
            Backend::Host(view) => Ok(view.wait(timeout)),
        }
    }

    /// The driver's counters, `None` on the host, which has no driver.
    ///
    /// # Errors
    /// [`ViewError::System`].
    pub fn stats(&self) -> Result<Option<Stats>, ViewError> {
        match &self.backend {
            Backend::Device(view) => view.stats().map(Some),
            Backend::Host(_) => Ok(None),
        }
    }

    /// Closes the view; accesses through mappings that are left are lost.
    ///
    /// # Errors
    /// [`ViewError::System`].
    pub fn detach(self) -> Result<(), ViewError> {
        match self.backend {
            Backend::Device(view) => view.detach(),
            Backend::Host(view) => {
                view.detach();
                Ok(())
            }
        }
    }
}

/// The broker's socket that [`View::attach`] uses.
pub fn default_socket() -> PathBuf {
    std::env::var_os(SOCKET_VARIABLE).map_or_else(|| DEFAULT_SOCKET.into(), PathBuf::from)
}
