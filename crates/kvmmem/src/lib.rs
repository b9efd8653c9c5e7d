// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Client library for introspection tools: a process reads the memory of a virtual machine (the
//! target), from another virtual machine or from the host.
//!
//! A [`View`] is a target's memory, opened with a token that the target's owner grants. It can be
//! read, written if the grant allows it, searched for data, and mapped. Tools use it in the same
//! way in a virtual machine (`/dev/kvmmem`) and on the host (the broker's socket).
//!
//! ```no_run
//! use std::time::Duration;
//! use kvmmem::{Access, Event, Range, Token, View};
//!
//! let token: Token = std::env::var("KVMMEM_TOKEN")?.parse()?;
//! let view = View::attach(&token, Access::ReadOnly)?;
//! for Range { gpa, len } in view.ranges()? {
//!     println!("{len:#x} bytes at {gpa:#x}");
//! }
//!
//! // Copied reads, whole or not at all.
//! let mut bytes = [0; 64];
//! view.read_at(0x10_0000, &mut bytes)?;
//!
//! // Many pieces in one call: fast, and for private RAM the only fast way.
//! let (mut table, mut task) = ([0; 4096], [0; 512]);
//! view.read_vectored(&mut [(0x20_0000, &mut table[..]), (0x41_3000, &mut task[..])])?;
//!
//! // A mapping is the target's memory itself: an access needs no system call.
//! let mapping = view.map(Range { gpa: 0x20_0000, len: 0x20_0000 })?;
//! println!("{:#x}", mapping.read_u64(0)?);
//!
//! // The owner may revoke the grant at any time. Reads of views and of mappings fail then.
//! if let Some(Event::Revoked | Event::Gone) = view.wait(Duration::from_secs(1))? {
//!     println!("{}", mapping.read_u64(0).unwrap_err());
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # KVMI, and one page at a time
//!
//! ```no_run
//! use std::time::Duration;
//! use kvmmem::{Device, Listener};
//!
//! // The tool listens; the broker connects once for each VM that is hooked to this port.
//! let listener = Listener::bind(&"vsock:1234".parse()?)?;
//! let mut target = listener.accept(Duration::from_secs(30))?;
//!
//! // Copied reads go over that connection.
//! let mut bytes = [0; 64];
//! target.read_physical(0x10_0000, &mut bytes)?;
//!
//! // v1 maps one page with one token, which the connection gives out.
//! let device = Device::open_default()?;
//! let page = device.map(target.map_token()?, 0x10_0000)?;
//! println!("{:#x}", page.read_u64(0)?);
//! page.unmap()?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! [`Listener`] and [`Session`] speak KVMI (crate `kvmmem-kvmi`); its tokens attach views as well.
//! [`Device`] and [`MappedPage`] use v1's ioctls of `/dev/kvmmem`, [`View`] the ioctls of views
//! (crate `kvmmem-abi`) or the broker's socket (crate `kvmmem-proto`). All calls block; a call that
//! waits for a peer has a time limit.
#![deny(unsafe_code)]

pub mod device;
mod explain;
pub mod host;
mod inbox;
pub mod listener;
mod operation;
/// Pattern search in a mapping, in place: [`Mapping::find`].
pub mod search {
    pub use kvmmem_sys::search::{Atoms, Candidates, MaskedByte, PLACES, Probe};
}
pub mod session;
mod stream;
pub mod view;

pub use device::{Device, DeviceError, MappedPage};
pub use kvmmem_kvmi::token::Token;
pub use kvmmem_memory::{Memory, Range, paging};
pub use kvmmem_sys::page::{PAGE_SIZE, Page, PageError};
pub use listener::{Endpoint, Listener, ListenerError};
pub use session::{Session, SessionError};
pub use view::{
    Access, Event, Mapping, MappingError, State, Status, VectoredError, View, ViewError,
};

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
