// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How a tool gets a [`View`].

use std::path::Path;
use std::sync::Arc;

use kvmmem_kvmi::token::Token;
use kvmmem_memory::Range;
use kvmmem_proto::message::Caller;

use super::device::DeviceView;
use super::error::ViewError;
use super::guest_endpoint::GuestEndpointError;
use super::host::HostView;
use super::status::Access;
use super::sysfs::{self, SysfsView};
use super::{View, default_socket};
use crate::device::default_path;

impl View {
    /// Attaches the virtual machine that `token` names; this uses the token. The device is tried
    /// first (at `$KVMMEM_DEVICE`, or else [`crate::device::DEFAULT_PATH`]), then this host's
    /// broker (at `$KVMMEM_BROKER`, or else [`super::DEFAULT_SOCKET`]), then, in a virtual machine, the
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
        Ok(Self { backend: Arc::new(HostView::attach(socket, token, access, ranges)?) })
    }
}
