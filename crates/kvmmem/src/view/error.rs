// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Errors of views, each with the operation, the address and what to do about it.

use std::fmt;
use std::io;
use std::path::PathBuf;

use kvmmem_proto::map::SHARE_IT;

use crate::host::{ClientError, CopyError};
use kvmmem_sys::device::OpenError;
use rustix::io::Errno;

use super::guest_endpoint::GuestEndpointError;
use super::status::State;
use super::sysfs::discover::SysfsError;
use crate::explain;

/// Something done with a view, for messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ViewOperation {
    /// Asking for state and ranges.
    Status,
    /// Reading.
    Read {
        /// First guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: usize,
    },
    /// Writing.
    Write {
        /// First guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: usize,
    },
    /// Looking for data.
    Seek {
        /// First guest-physical address.
        gpa: u64,
    },
    /// Mapping.
    Map {
        /// First guest-physical address.
        gpa: u64,
        /// Length in bytes.
        len: u64,
    },
    /// Waiting for events.
    Wait,
    /// Asking for the counters.
    Stats,
    /// Closing.
    Detach,
}

impl fmt::Display for ViewOperation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Status => f.write_str("cannot ask for the view's state"),
            Self::Read { gpa, len } => write!(f, "cannot read {len:#x} bytes at gpa {gpa:#x}"),
            Self::Write { gpa, len } => write!(f, "cannot write {len:#x} bytes at gpa {gpa:#x}"),
            Self::Seek { gpa } => write!(f, "cannot look for data from gpa {gpa:#x} on"),
            Self::Map { gpa, len } => write!(f, "cannot map {len:#x} bytes at gpa {gpa:#x}"),
            Self::Wait => f.write_str("cannot wait for the view's events"),
            Self::Stats => f.write_str("cannot ask for the view's counters"),
            Self::Detach => f.write_str("cannot close the view"),
        }
    }
}

/// Why a view could not be opened or used.
#[derive(Debug, thiserror::Error)]
pub enum ViewError {
    /// This is neither a virtual machine with the driver nor a host with the broker.
    #[error(
        "there is neither {} (in a virtual machine: modprobe kvmmem) nor {} (on a host: is kvmmemd running? in an introspector, as another user than root: is kvmmem proxy running?)",
        device.display(), socket.display()
    )]
    Nowhere {
        /// Where the device was looked for.
        device: PathBuf,
        /// Where the broker's socket was looked for.
        socket: PathBuf,
        /// In a virtual machine, why its host was not reached, which shows views to machines
        /// without the driver as well.
        #[source]
        endpoint: Option<Box<GuestEndpointError>>,
    },
    /// The device could not be opened.
    #[error("cannot open {}{remedy}", path.display())]
    Open {
        /// The device's path.
        path: PathBuf,
        /// What to do about it, where that is known.
        remedy: &'static str,
        /// What went wrong.
        #[source]
        source: OpenError,
    },
    /// The device did not say what it can do.
    #[error("cannot ask {} for its features: {}", path.display(), explain::info(*source))]
    Info {
        /// The device's path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// The driver speaks another version.
    #[error(
        "{} has version {found} of the views' interface, this library has version {}: update the older one",
        path.display(), kvmmem_abi::native::VERSION
    )]
    Version {
        /// The device's path.
        path: PathBuf,
        /// The driver's version.
        found: u32,
    },
    /// The host offers this virtual machine no views.
    #[error("{}: this VM's host offers no views; map page by page (Device), or see kvmmem doctor", path.display())]
    NoViews {
        /// The device's path.
        path: PathBuf,
    },
    /// The view was refused; the token is most likely used up.
    #[error("cannot attach a view at {}: {}", path.display(), explain::attach(*source))]
    Attach {
        /// The device's path.
        path: PathBuf,
        /// The system's answer.
        #[source]
        source: Errno,
    },
    /// The host, which shows views as devices of this virtual machine, gave none.
    #[error("the host opened no view")]
    GuestEndpoint(#[source] Box<GuestEndpointError>),
    /// The host opened the view, but this process cannot use its devices without the module.
    #[error("cannot use the view's devices without the module kvmmem")]
    Sysfs(#[source] Box<SysfsError>),
    /// The broker gave no view.
    #[error("the broker at {} gave no view{remedy}", socket.display())]
    AttachHost {
        /// The broker's socket.
        socket: PathBuf,
        /// What to do about it, where that is known.
        remedy: &'static str,
        /// What went wrong.
        #[source]
        source: Box<ClientError>,
    },
    /// There is no thread or file descriptor left for hearing of the view's end.
    #[error("cannot watch for the view's end")]
    Watch(#[source] io::Error),
    /// The view does not reach an address: the target has no memory there, or the grant does not
    /// say so.
    #[error(
        "{operation}: gpa {gpa:#x} is not memory of the target, or the grant does not reach it; see the view's ranges"
    )]
    Hole {
        /// What was to be done.
        operation: ViewOperation,
        /// The first such address.
        gpa: u64,
    },
    /// The grant was revoked.
    #[error("{operation}: the grant was revoked; ask for a new token")]
    Revoked {
        /// What was to be done.
        operation: ViewOperation,
    },
    /// The target, or the host's service, is gone.
    #[error("{operation}: the target, or the host's service, is gone")]
    Gone {
        /// What was to be done.
        operation: ViewOperation,
    },
    /// The view may not write.
    #[error(
        "{operation}: the view is read-only; writing takes a grant that was made with --rw, and a view that is not opened read-only (Access::Granted)"
    )]
    ReadOnly {
        /// What was to be done.
        operation: ViewOperation,
    },
    /// What is to be mapped is not made of whole pages.
    #[error("{operation}: address and length must be multiples of 0x1000, the length positive")]
    Pages {
        /// What was to be done.
        operation: ViewOperation,
    },
    /// The target's RAM is private to its VMM: it can be read and written, and not mapped.
    #[error(
        "{operation}: the target's RAM is private to its VMM, so it can be copied alone (read_at, write_at); {SHARE_IT}"
    )]
    Private {
        /// What was to be done.
        operation: ViewOperation,
    },
    /// The broker, which copies the memory of such a target, did not.
    #[error("{operation}: gpa {gpa:#x} was not copied")]
    Copy {
        /// What was to be done.
        operation: ViewOperation,
        /// The first address that was not copied.
        gpa: u64,
        /// Why.
        #[source]
        source: Box<CopyError>,
    },
    /// The system refused.
    #[error("{operation}: {}", explain::view(*source))]
    System {
        /// What was to be done.
        operation: ViewOperation,
        /// The system's answer.
        #[source]
        source: Errno,
    },
}

impl ViewError {
    /// The errno of the system call that failed or would have failed.
    ///
    /// ```no_run
    /// # fn example(error: kvmmem::ViewError) {
    /// if let Some(errno) = error.errno() {
    ///     eprintln!("{}", std::io::Error::from_raw_os_error(errno));
    /// }
    /// # }
    /// ```
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Open { source: OpenError::Open(error), .. } => error.raw_os_error(),
            Self::Info { source, .. }
            | Self::Attach { source, .. }
            | Self::System { source, .. } => Some(source.raw_os_error()),
            Self::Watch(error) => error.raw_os_error(),
            Self::Private { .. } => Some(Errno::OPNOTSUPP.raw_os_error()),
            Self::Copy { .. } => Some(Errno::IO.raw_os_error()),
            Self::GuestEndpoint(error) => match &**error {
                GuestEndpointError::Connect { source, .. } => source.raw_os_error(),
                _ => None,
            },
            _ => None,
        }
    }

    /// Whether only the memory at that address cannot be read or written, and the view can still be
    /// used: the VMM has no memory there (any more), or the hardware reports it as damaged.
    ///
    /// ```no_run
    /// # fn example(view: &kvmmem::View) -> Result<(), kvmmem::ViewError> {
    /// let mut page = [0; 4096];
    /// match view.read_at(0x10_0000, &mut page) {
    ///     Err(error) if error.is_unreadable() => println!("skip this page"),
    ///     other => other?,
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub fn is_unreadable(&self) -> bool {
        match self {
            Self::Hole { .. } => true,
            Self::Copy { source, .. } => matches!(**source, CopyError::NoMemory),
            Self::System { source, .. } => {
                matches!(*source, Errno::IO | Errno::FAULT | Errno::NXIO | Errno::HWPOISON)
            }
            _ => false,
        }
    }

    /// The error for an errno that the driver returned for `operation` at `gpa`.
    pub(super) fn of(operation: ViewOperation, gpa: u64, source: Errno) -> Self {
        match source {
            Errno::NXIO => Self::Hole { operation, gpa },
            Errno::KEYREVOKED => Self::Revoked { operation },
            Errno::STALE => Self::Gone { operation },
            Errno::ACCESS => Self::ReadOnly { operation },
            source => Self::System { operation, source },
        }
    }
}

impl State {
    /// Whether the view is open.
    pub(super) fn check(self, operation: ViewOperation) -> Result<(), ViewError> {
        match self {
            Self::Open => Ok(()),
            Self::Revoked => Err(ViewError::Revoked { operation }),
            Self::Gone => Err(ViewError::Gone { operation }),
        }
    }
}
