// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Client library for introspection tools: a process in one virtual machine that looks at another one's memory.
//!
//! ```no_run
//! use std::time::Duration;
//! use kvmmem::{Device, Listener};
//!
//! // The tool listens; the host's introspection service connects, once for each VM that is hooked to this port.
//! let listener = Listener::bind(&"vsock:1234".parse()?)?;
//! let mut target = listener.accept(Duration::from_secs(30))?;
//!
//! // Copied reads go over that connection.
//! let mut bytes = [0; 64];
//! target.read_physical(0x10_0000, &mut bytes)?;
//!
//! // A mapped page is the target's memory itself; a token from the connection allows it.
//! let device = Device::open_default()?;
//! let page = device.map(target.map_token()?, 0x10_0000)?;
//! println!("{:#x}", page.read_u64(0)?);
//! page.unmap()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`Listener`] and [`Session`] speak KVMI (crate `kvmmem-kvmi`); [`Device`] and [`MappedPage`] use the ioctls of
//! `/dev/kvmmem` (crate `kvmmem-abi`). Everything blocks, and everything that waits for a peer has a time limit.
#![deny(unsafe_code)]

pub mod device;
mod explain;
mod inbox;
pub mod listener;
mod operation;
pub mod paging;
pub mod session;
mod stream;
pub mod view;

pub use device::{Device, DeviceError, MappedPage};
pub use kvmmem_kvmi::token::Token;
pub use kvmmem_sys::page::{PAGE_SIZE, Page, PageError};
pub use listener::{Endpoint, Listener, ListenerError};
pub use session::{Session, SessionError};
pub use view::{Access, Event, Mapping, MappingError, Range, State, Status, View, ViewError};
