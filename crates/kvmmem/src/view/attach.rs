// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a tool gets a [`View`].

use std::path::Path;
use std::sync::Arc;

use kvmmem_kvmi::token::Token;
use kvmmem_memory::Range;
use kvmmem_proto::message::Caller;
use kvmmem_proto::packet::PacketError;
use rustix::io::Errno;

use super::device::DeviceView;
use super::error::ViewError;
use super::guest_endpoint::GuestEndpointError;
use super::host::HostBackend;
use super::status::Access;
use super::sysfs::{self, SysfsView};
use super::{View, default_socket};
use crate::device::default_path;
use crate::host::ClientError;

impl View {
    /// Attaches the virtual machine that `token` names; this uses the token. The device is tried
    /// first (at `$KVMMEM_DEVICE`, or else [`crate::device::DEFAULT_PATH`]), then this host's
    /// broker (at `$KVMMEM_BROKER`, or else [`super::DEFAULT_SOCKET`]), then, in a virtual machine,
    /// the way without the module. There `kvmmem proxy` has the broker's socket; if it was killed,
    /// its socket is left, and root attaches without the module as well.
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
            match Self::attach_host_reaching(&socket, token, access, ranges) {
                Err(error) if is_unserved(&error) && is_root() && sysfs::is_possible() => {
                    without_proxy(error, Self::attach_without_module(token, access))
                }
                attached => attached,
            }
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
        Self::attach_without_module_for(token, access, Caller::this_process())
    }

    /// As [`View::attach_without_module`], for another process, which the host's audit log names.
    ///
    /// ```no_run
    /// use kvmmem::{Access, View};
    /// use kvmmem_proto::message::Caller;
    ///
    /// let token = std::env::var("KVMMEM_TOKEN")?.parse()?;
    /// let caller = Caller { pid: 411, uid: 1000, comm: "scan".into() };
    /// let view = View::attach_without_module_for(&token, Access::ReadOnly, caller)?;
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    /// As [`View::attach_without_module`].
    pub fn attach_without_module_for(
        token: &Token,
        access: Access,
        caller: Caller,
    ) -> Result<Self, ViewError> {
        Ok(Self { backend: SysfsView::attach(token, access, caller)? })
    }

    /// Attaches by the device at `path`. If views come as PCI devices on this host, the host's
    /// guest endpoint is asked for the view first, which may take up to 15 s.
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
        Ok(Self { backend: Arc::new(DeviceView::attach(path, token, access)?) })
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
        Ok(Self { backend: Arc::new(HostBackend::attach(socket, token, access, ranges)?) })
    }
}

/// Whether no process listens at the socket: it was left by one that was killed, or went at once.
fn is_unserved(error: &ViewError) -> bool {
    let ViewError::AttachHost { source, .. } = error else { return false };
    let ClientError::Connect { source: PacketError::Connect(errno), .. } = **source else {
        return false;
    };
    matches!(errno, Errno::CONNREFUSED | Errno::NOENT)
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// What comes of attaching `direct`ly where no process listens at the socket. If the host has no
/// guest endpoint, this is a host itself, in a virtual machine, and the socket its broker's.
fn without_proxy(error: ViewError, direct: Result<View, ViewError>) -> Result<View, ViewError> {
    match direct {
        Err(ViewError::GuestEndpoint(endpoint))
            if matches!(*endpoint, GuestEndpointError::Connect { .. }) =>
        {
            Err(error)
        }
        attached => attached,
    }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags};

    use super::*;
    use crate::view::ViewOperation;

    fn attach(socket: &Path) -> ViewError {
        View::attach_host(socket, &Token::new([1, 2, 3, 4]), Access::ReadOnly).unwrap_err()
    }

    #[test]
    fn a_proxy_that_was_killed_is_told_from_one_that_refuses() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("kvmmemd.sock");
        assert!(is_unserved(&attach(&path)), "it went at once");
        let (listener, lock) = kvmmem_proto::listener::bind(&path, None).unwrap();
        let served = std::thread::scope(|scope| {
            let tool = scope.spawn(|| attach(&path));
            let files = &mut [PollFd::new(&listener, PollFlags::IN)];
            rustix::event::poll(files, None).unwrap();
            drop(rustix::net::accept(&listener).unwrap());
            tool.join().unwrap()
        });
        assert!(!is_unserved(&served), "{served}");
        drop((listener, lock));
        let left = attach(&path);
        assert!(path.exists() && is_unserved(&left), "{left}");
        // A user that is not root has no other way.
        let text = left.to_string();
        for word in [&*path.to_string_lossy(), "kvmmem proxy --group", "as root", "kvmmemd"] {
            assert!(text.contains(word), "{word}: {text}");
        }
    }

    #[test]
    fn without_a_proxy_the_direct_way_counts_if_there_is_one() {
        let left = || ViewError::Nowhere { device: "/".into(), socket: "/".into(), endpoint: None };
        let ended = ViewError::Revoked { operation: ViewOperation::Status };
        let error = without_proxy(left(), Err(ended)).unwrap_err();
        assert!(matches!(error, ViewError::Revoked { .. }), "{error}");
        let source = Errno::CONNRESET.into();
        let endpoint = Box::new(GuestEndpointError::Connect { port: 1, source });
        let error = without_proxy(left(), Err(ViewError::GuestEndpoint(endpoint))).unwrap_err();
        assert!(matches!(error, ViewError::Nowhere { .. }), "{error}");
    }
}
