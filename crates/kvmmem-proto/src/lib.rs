// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What travels between the broker (`kvmmemd`) and its peers: VMMs, operators, processes of the
//! host and tools in guests.
//!
//! The broker, its clients (`kvmmem-client`) and the library for tools (`kvmmem`) depend on this
//! crate and never on each other. It has the codecs and the sockets that carry them; it starts no
//! thread and decides no right. [`client`] is what all clients of the broker share.
//!
//! | Peer | Transport | Codec |
//! |---|---|---|
//! | VMM, operator, process of the host | unix SOCK_SEQPACKET with descriptors, [`packet`] | [`message`] |
//! | process of the host that reads private RAM | unix SOCK_SEQPACKET and a shared buffer | [`copy`] |
//! | tool in a guest | vsock | [`guest`] |
#![deny(unsafe_code)]

pub mod client;
pub mod copy;
pub mod credentials;
pub mod endpoint;
pub mod guest;
pub mod listener;
pub mod map;
pub mod message;
pub mod name;
pub mod packet;
pub mod scope;
pub mod timed;

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
