// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The VM's side of a connection: handshake, then one reply for each request, until the tool
//! closes.
//!
//! [`Connection`] takes one turn at a time over a socket that need not block, and keeps what has
//! come of a message and what is left to send between turns. So one thread can serve many tools,
//! and a tool that is idle or late needs none. [`serve`] is the same for a thread that has nothing
//! else to do.
//!
//! An idle tool may stay for ever. A tool that has begun a handshake or a message, or that does not
//! read its replies, has a limited time to continue ([`Limits`]).

mod connection;
mod error;
mod inbox;
mod socket;

pub use connection::{Connection, Limits, Turn, Workspace};
pub use error::ServeError;
pub use socket::{Socket, serve, serve_within};
