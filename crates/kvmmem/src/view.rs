// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Views: the memory of one virtual machine, as far as a token allows, until the tool detaches or
//! the grant is revoked.
//!
//! This is what analysis tools and the command line use. [`View`] dispatches to the driver
//! (`device`) or the broker (`host`), and both report the same errors.
//!
//! # How a view is opened
//!
//! | where | by |
//! |---|---|
//! | in a virtual machine of `kvmmem vm` | the device alone: its driver passes the token on by hypercall |
//! | in one under a stock QEMU | the host's *guest endpoint* first, which is at vsock context id 2, port 27510 (or `$KVMMEM_GUEST_PORT`): the host plugs the view's memory in as PCI devices; then the device, whose driver has found them |
//! | in one under a stock QEMU, without the driver | the guest endpoint as well; then this process maps the PCI devices by `/sys`, as root (see below) |
//! | on the host | the broker's socket |
//!
//! The driver reports which of the first two applies (`FEATURE_DEVICES` of `kvmmem-abi`). The
//! connection to the guest endpoint lives as long as the [`View`] and its [`Mapping`]s. When the
//! process closes it, or exits, the host unplugs the devices. When the broker closes it,
//! [`View::wait`] and [`View::status`] report that the view is [gone](State::Gone), since the grant
//! could not be revoked any more.
//!
//! # Without the module
//!
//! Any kernel from 5.10 on will do, if the operator trusts the virtual machine as a whole
//! (`kvmmem introspector add --trusted`) and it is not locked down. Differences:
//!
//! - The tool must be root.
//! - Each access through [`View`] and [`Mapping`] is proven: it succeeds only if the bytes are the
//!   view's. Only an access of your own at [`Mapping::address`] is not.
//! - The host asks this process to release the memory, and waits for it for a second. If it is
//!   stopped and does neither answer nor exit, the PCI port stays unused until the machine is reset.
//! - [`View::data_from`] knows the ranges only, and [`View::stats`] returns `None`.
//!
//! # Signals
//!
//! Reading a page that was removed raises SIGBUS, or SIGILL in a virtual machine without the
//! module. [`Mapping`]'s methods turn it into an error: the first mapping, or the first
//! [`View::read_vectored`] on the host, installs a handler of both for the process. The handler
//! recognises these methods' accesses and passes every other such signal to the handler that was
//! installed before, or to the default action. Install other handlers first, or have them pass on
//! signals that are not theirs. Do not block either signal in a thread that uses mappings (its
//! first use unblocks both).
//!
//! # Fork and exec
//!
//! In a virtual machine a view belongs to its open file: a forked child shares it, and it ends for
//! both at once. On the host, and without the module, only the process that attached is notified of
//! the end: a child must not use the view that it inherits. `exec` ends all of them.

mod clear;
mod device;
mod error;
mod events;
mod guest_endpoint;
mod host;
mod mapping;
mod memory;
mod reader;
mod status;
mod sysfs;
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
use mapping::Keeps;
pub use mapping::{Mapping, MappingError};
pub use status::{Access, Event, State, Status};
use sysfs::SysfsView;
pub use sysfs::discover::SysfsError;
pub use vectored::VectoredError;

/// Environment variable with the path of the broker's socket.
pub const SOCKET_VARIABLE: &str = "KVMMEM_BROKER";

/// The socket of the host's broker, kvmmemd, by default.
pub const DEFAULT_SOCKET: &str = "/run/kvmmem/kvmmemd.sock";

/// The memory of one virtual machine. The view stays open while a [`Mapping`] of it lives.
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
    Sysfs(Arc<SysfsView>),
}

impl View {
    /// Attaches the virtual machine that `token` names; this uses the token. The device is tried
    /// first (at `$KVMMEM_DEVICE`, or else [`crate::device::DEFAULT_PATH`]), then this host's
    /// broker (at `$KVMMEM_BROKER`, or else [`DEFAULT_SOCKET`]), then, in a virtual machine, the
    /// way without the module.
    ///
    /// ```no_run
    /// use kvmmem::{Access, View};
    ///
    /// let token = std::env::var("KVMMEM_TOKEN")?.parse()?;
    /// let view = View::attach(&token, Access::ReadOnly)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`ViewError`], with what to do about it.
    pub fn attach(token: &Token, access: Access) -> Result<Self, ViewError> {
        Self::attach_reaching(token, access, &[])
    }

    /// As [`View::attach`], for a tool that needs `ranges`. On the host the broker refuses a view
    /// without memory in one of the first 64 of them, and does not use the token. In a virtual
    /// machine the driver cannot ask before it uses the token, and ignores `ranges`. So check
    /// [`View::ranges`] in any case.
    ///
    /// ```no_run
    /// use kvmmem::{Access, Range, View};
    ///
    /// let token = std::env::var("KVMMEM_TOKEN")?.parse()?;
    /// let wanted = [Range { gpa: 0x10_0000, len: 0x1000 }];
    /// let view = View::attach_reaching(&token, Access::ReadOnly, &wanted)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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
        } else if sysfs::is_possible() {
            Self::attach_without_module(token, access).map_err(|error| match error {
                ViewError::GuestEndpoint(endpoint)
                    if matches!(*endpoint, GuestEndpointError::Connect { .. }) =>
                {
                    ViewError::Nowhere { device, socket, endpoint: Some(endpoint) }
                }
                error => error,
            })
        } else {
            Err(ViewError::Nowhere { device, socket, endpoint: None })
        }
    }

    /// Attaches in a virtual machine under a stock QEMU without the module, which takes root: see
    /// [`crate::view`] on what that lacks.
    ///
    /// ```no_run
    /// use kvmmem::{Access, View};
    ///
    /// let token = std::env::var("KVMMEM_TOKEN")?.parse()?;
    /// let view = View::attach_without_module(&token, Access::ReadOnly)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`ViewError`], with what to do about it.
    pub fn attach_without_module(token: &Token, access: Access) -> Result<Self, ViewError> {
        Ok(Self { backend: Backend::Sysfs(SysfsView::attach(token, access)?) })
    }

    /// Attaches by the device at `path`. If views come as PCI devices on this host, the host's guest
    /// endpoint is asked for the view first, which may take up to 15 s.
    ///
    /// ```no_run
    /// use kvmmem::{Access, View, device};
    ///
    /// let token = std::env::var("KVMMEM_TOKEN")?.parse()?;
    /// let view = View::attach_device(device::DEFAULT_PATH.as_ref(), &token, Access::Granted)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`ViewError`], with what to do about it.
    pub fn attach_device(path: &Path, token: &Token, access: Access) -> Result<Self, ViewError> {
        Ok(Self { backend: Backend::Device(DeviceView::attach(path, token, access)?) })
    }

    /// Attaches by the broker that listens at `socket` on this host.
    ///
    /// ```no_run
    /// use kvmmem::{Access, View, view};
    ///
    /// let token = std::env::var("KVMMEM_TOKEN")?.parse()?;
    /// let view = View::attach_host(&view::default_socket(), &token, Access::ReadOnly)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// [`ViewError`], with what to do about it.
    pub fn attach_host(socket: &Path, token: &Token, access: Access) -> Result<Self, ViewError> {
        Self::attach_host_reaching(socket, token, access, &[])
    }

    /// As [`View::attach_reaching`] on the host, by the broker that listens at `socket`.
    ///
    /// ```no_run
    /// use kvmmem::{Access, Range, View, view};
    ///
    /// let token = std::env::var("KVMMEM_TOKEN")?.parse()?;
    /// let wanted = [Range { gpa: 0x10_0000, len: 0x1000 }];
    /// let socket = view::default_socket();
    /// let view = View::attach_host_reaching(&socket, &token, Access::ReadOnly, &wanted)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
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

    /// The view's state and ranges, also after it has ended.
    ///
    /// ```no_run
    /// # fn example(view: &kvmmem::View) -> Result<(), kvmmem::ViewError> {
    /// let status = view.status()?;
    /// println!("{:?}, {} ranges", status.state, status.ranges.len());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ViewError::System`].
    pub fn status(&self) -> Result<Status, ViewError> {
        match &self.backend {
            Backend::Device(view) => view.status(),
            Backend::Host(view) => Ok(view.status()),
            Backend::Sysfs(view) => Ok(view.status()),
        }
    }

    /// The target's name; `None` in a virtual machine, which does not know it.
    ///
    /// ```no_run
    /// # fn example(view: &kvmmem::View) -> Result<(), kvmmem::ViewError> {
    /// println!("{}", view.name().unwrap_or("(unknown)"));
    /// # Ok(())
    /// # }
    /// ```
    pub fn name(&self) -> Option<&str> {
        match &self.backend {
            Backend::Device(_) | Backend::Sysfs(_) => None,
            Backend::Host(view) => Some(view.name()).filter(|name| !name.is_empty()),
        }
    }

    /// Identifies one run of the target. All views of the target have the same number, in guests and
    /// on the host, until the target is reset, its RAM changes or its VMM exits. No other target
    /// has it. `None` if the host or the driver does not report it.
    ///
    /// ```no_run
    /// # fn example(view: &kvmmem::View) -> Result<(), kvmmem::ViewError> {
    /// let before = view.instance()?;
    /// // Later: addresses found before are those of an earlier run if the number has changed.
    /// let is_same_run = before.is_some() && view.instance()? == before;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ViewError::System`].
    pub fn instance(&self) -> Result<Option<u64>, ViewError> {
        match &self.backend {
            Backend::Device(view) => view.instance(),
            Backend::Host(view) => Ok(Some(view.instance())),
            Backend::Sysfs(view) => Ok(view.instance()),
        }
    }

    /// The memory that can be reached: disjoint, in pages, ascending; empty once the view has ended.
    ///
    /// ```no_run
    /// # fn example(view: &kvmmem::View) -> Result<(), kvmmem::ViewError> {
    /// for range in view.ranges()? {
    ///     println!("{:#x} bytes at {:#x}", range.len, range.gpa);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`View::status`].
    pub fn ranges(&self) -> Result<Vec<Range>, ViewError> {
        Ok(self.status()?.ranges)
    }

    /// Reads guest-physical memory at `gpa` into `buf`.
    ///
    /// ```no_run
    /// # fn example(view: &kvmmem::View) -> Result<(), kvmmem::ViewError> {
    /// let mut bytes = [0; 64];
    /// view.read_at(0x10_0000, &mut bytes)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ViewError::Hole`] with the first address that has no memory or is not granted,
    /// [`ViewError::Revoked`], [`ViewError::Gone`]. `buf` may be filled in part.
    pub fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), ViewError> {
        match &self.backend {
            Backend::Device(view) => view.read_at(gpa, buf),
            Backend::Host(view) => view.read_at(gpa, buf),
            Backend::Sysfs(view) => view.read_at(gpa, buf),
        }
    }

    /// Reads each piece at its guest-physical address, in order, as [`View::read_at`] reads one.
    /// Pieces may have any length and may overlap in the target.
    ///
    /// On the host this is the fast way to read many small pieces. Pages that are read repeatedly
    /// need no system call: the first call maps them (see [`crate::view`] on signals). If the
    /// target's RAM is private, the broker copies many pieces at a time. In a virtual machine each
    /// piece is a `pread`.
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
    /// [`VectoredError`] with the first piece that could not be read, and why, as for
    /// [`View::read_at`]. All pieces before it are filled; pieces after it may be.
    pub fn read_vectored(&self, pieces: &mut [(u64, &mut [u8])]) -> Result<(), VectoredError> {
        match &self.backend {
            Backend::Device(view) => view.read_vectored(pieces),
            Backend::Host(view) => view.read_vectored(pieces),
            Backend::Sysfs(view) => view.read_vectored(pieces),
        }
    }

    /// Writes `bytes` to guest-physical memory at `gpa`.
    ///
    /// ```no_run
    /// # fn example(view: &kvmmem::View) -> Result<(), kvmmem::ViewError> {
    /// view.write_at(0x10_0000, b"patched")?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`View::read_at`], and [`ViewError::ReadOnly`]. `bytes` may be written in part.
    pub fn write_at(&self, gpa: u64, bytes: &[u8]) -> Result<(), ViewError> {
        match &self.backend {
            Backend::Device(view) => view.write_at(gpa, bytes),
            Backend::Host(view) => view.write_at(gpa, bytes),
            Backend::Sysfs(view) => view.write_at(gpa, bytes),
        }
    }

    /// The next range at `gpa` or after it that holds data; `None` after the last. A gap between
    /// ranges is no memory, not granted, or memory that the target never wrote or has freed. The
    /// latter reads as zeros, and reading it through a mapping may make the host allocate it.
    ///
    /// If the host cannot tell, or the target's RAM is private to its VMM, all memory counts as
    /// data.
    ///
    /// ```no_run
    /// # fn example(view: &kvmmem::View) -> Result<(), kvmmem::ViewError> {
    /// let mut gpa = 0;
    /// while let Some(range) = view.data_from(gpa)? {
    ///     println!("{:#x} bytes of data at {:#x}", range.len, range.gpa);
    ///     gpa = range.end();
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ViewError::Revoked`], [`ViewError::Gone`].
    pub fn data_from(&self, gpa: u64) -> Result<Option<Range>, ViewError> {
        match &self.backend {
            Backend::Device(view) => view.data_from(gpa),
            Backend::Host(view) => view.data_from(gpa),
            Backend::Sysfs(view) => view.data_from(gpa),
        }
    }

    /// The parts of `range`, in pages, that hold data. Unlike [`View::data_from`] it never looks
    /// beyond `range`, so that threads can share the work. `None` in a virtual machine, where this
    /// cannot be told: use [`View::data_from`].
    ///
    /// ```no_run
    /// # fn example(view: &kvmmem::View) -> Result<(), kvmmem::ViewError> {
    /// # let range = kvmmem::Range { gpa: 0, len: 0x1000 };
    /// match view.data_in(range)? {
    ///     Some(parts) => println!("{} parts hold data", parts.len()),
    ///     None => println!("search all of it"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ViewError::Revoked`], [`ViewError::Gone`].
    pub fn data_in(&self, range: Range) -> Result<Option<Vec<Range>>, ViewError> {
        match &self.backend {
            Backend::Device(_) | Backend::Sysfs(_) => Ok(None),
            Backend::Host(view) => view.data_in(range),
        }
    }

    /// Maps `range`, whole pages, into this process. Nothing is copied: pages are mapped as they are
    /// accessed, and the target's writes are visible at once.
    ///
    /// ```no_run
    /// # fn example(view: &kvmmem::View) -> Result<(), kvmmem::ViewError> {
    /// let mapping = view.map(kvmmem::Range { gpa: 0x20_0000, len: 0x20_0000 })?;
    /// println!("mapped at {:#x}", mapping.address());
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ViewError::Pages`] for a range that is not whole pages; [`ViewError::Hole`],
    /// [`ViewError::Revoked`], [`ViewError::Gone`]; [`ViewError::Private`] if the target's RAM can
    /// only be copied.
    pub fn map(&self, range: Range) -> Result<Mapping, ViewError> {
        match &self.backend {
            Backend::Device(view) => view.map(range),
            Backend::Host(view) => view.map(range),
            Backend::Sysfs(view) => {
                let memory = view.map(range)?;
                Ok(Mapping::new(range.gpa, memory, Some(Keeps::Sysfs(Arc::clone(view)))))
            }
        }
    }

    /// Waits at most `timeout` for an event. Every call after the view's end reports the end.
    ///
    /// ```no_run
    /// # fn example(view: &kvmmem::View) -> Result<(), kvmmem::ViewError> {
    /// use std::time::Duration;
    /// use kvmmem::Event;
    ///
    /// match view.wait(Duration::from_secs(1))? {
    ///     Some(Event::Changed) => println!("now {:?}", view.ranges()?),
    ///     Some(Event::Revoked | Event::Gone) => println!("the view has ended"),
    ///     None => println!("nothing happened"),
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ViewError::System`].
    pub fn wait(&self, timeout: Duration) -> Result<Option<Event>, ViewError> {
        match &self.backend {
            Backend::Device(view) => view.wait(timeout),
            Backend::Host(view) => Ok(view.wait(timeout)),
            Backend::Sysfs(view) => Ok(view.wait(timeout)),
        }
    }

    /// The driver's counters; `None` on the host and without the module, where there is no driver.
    ///
    /// ```no_run
    /// # fn example(view: &kvmmem::View) -> Result<(), kvmmem::ViewError> {
    /// if let Some(stats) = view.stats()? {
    ///     println!("{} bytes read", stats.read_bytes);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`ViewError::System`].
    pub fn stats(&self) -> Result<Option<Stats>, ViewError> {
        match &self.backend {
            Backend::Device(view) => view.stats().map(Some),
            Backend::Host(_) | Backend::Sysfs(_) => Ok(None),
        }
    }

    /// Closes the view. Accesses through mappings that still exist fail from then on.
    ///
    /// ```no_run
    /// # fn example(view: kvmmem::View) -> Result<(), kvmmem::ViewError> {
    /// view.detach()?;
    /// # Ok(())
    /// # }
    /// ```
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
            Backend::Sysfs(view) => {
                view.detach();
                Ok(())
            }
        }
    }
}

/// The broker's socket that [`View::attach`] uses.
///
/// ```
/// println!("{}", kvmmem::view::default_socket().display());
/// ```
pub fn default_socket() -> PathBuf {
    std::env::var_os(SOCKET_VARIABLE).map_or_else(|| DEFAULT_SOCKET.into(), PathBuf::from)
}
