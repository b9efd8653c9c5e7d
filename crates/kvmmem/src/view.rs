// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Views: the memory of one virtual machine, as far as a token allows, until the tool detaches or
//! the grant is revoked.
//!
//! This is what analysis tools and the command line use. [`View`] has one of three backends, the
//! driver (`device`), the broker (`host`) or PCI devices that this process maps (`sysfs`); all
//! report the same errors.
//!
//! # How a view is opened
//!
//! | where | by |
//! |---|---|
//! | in a virtual machine of `kvmmem vm` | the device alone: its driver passes the token on by hypercall |
//! | in one under a stock QEMU | the host's *guest endpoint* first, which is at vsock context id 2, port 27510 (or `$KVMMEM_GUEST_PORT`): the host plugs the view's memory in as PCI devices; then the device, whose driver has found them |
//! | in one under a stock QEMU, without the driver | the guest endpoint as well; then this process maps the PCI devices by `/sys`, as root (see below) |
//! | there, where `kvmmem proxy` runs | the proxy's socket, which is where a broker's is on a host: the proxy maps the devices, and copies |
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
//! - The tool must be root, or use `kvmmem proxy`, where memory can be read, and not mapped.
//! - Each access through [`View`] and [`Mapping`] is proven: it succeeds only if the bytes are the
//!   view's. Only an access of your own at [`Mapping::address`] is not.
//! - The host asks this process to release the memory, and waits for it for a second. If it is
//!   stopped and does neither answer nor exit, the PCI port stays unused until the machine is
//!   reset.
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

mod attach;
mod backend;
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

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use backend::Backend;
pub use error::{ViewError, ViewOperation};
pub use guest_endpoint::{GUEST_PORT_VARIABLE, GuestEndpointError, check_guest_endpoint};
pub use kvmmem_abi::native::Stats;
pub use kvmmem_memory::Range;
pub use kvmmem_proto::client::DEFAULT_SOCKET;
pub use mapping::{Mapping, MappingError};
pub use status::{Access, Event, State, Status};
pub use sysfs::discover::SysfsError;
pub use vectored::VectoredError;

/// Environment variable with the path of the broker's socket.
pub const SOCKET_VARIABLE: &str = "KVMMEM_BROKER";

/// The memory of one virtual machine. The view stays open while a [`Mapping`] of it lives.
///
/// In a virtual machine it is a file of `/dev/kvmmem`, on the host a connection to the broker (see
/// [`crate::view`]). All methods may be called by many threads at once.
#[derive(Debug)]
pub struct View {
    backend: Arc<dyn Backend>,
}

impl View {
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
        self.backend.status()
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
        self.backend.name()
    }

    /// Identifies one run of the target. All views of the target have the same number, in guests
    /// and on the host, until the target is reset, its RAM changes or its VMM exits. No other
    /// target has it. `None` if the host or the driver does not report it.
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
        self.backend.instance()
    }

    /// The memory that can be reached: disjoint, in pages, ascending; empty once the view has
    /// ended.
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
        self.backend.read_at(gpa, buf)
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
        self.backend.read_vectored(pieces)
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
        self.backend.write_at(gpa, bytes)
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
        self.backend.data_from(ViewOperation::Seek { gpa }, gpa)
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
        self.backend.data_in(ViewOperation::Seek { gpa: range.gpa }, range)
    }

    /// Maps `range`, whole pages, into this process. Nothing is copied: pages are mapped as they
    /// are accessed, and the target's writes are visible at once.
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
        let operation = ViewOperation::Map { gpa: range.gpa, len: range.len };
        if !range.is_pages() {
            return Err(ViewError::Pages { operation });
        }
        let memory = self.backend.map(operation, range)?;
        Ok(Mapping::new(range.gpa, memory, Arc::clone(&self.backend)))
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
        self.backend.wait(timeout)
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
        self.backend.stats()
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
        self.backend.detach()
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
