// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The KVMI protocol (KVM virtual machine introspection), numbering of the v6 and v7 kernel series.
//!
//! A connection is a stream socket, unix or vsock, one per introspected VM. The tool listens; the
//! VMM's side connects and sends first ([`handshake`]). After that the tool sends [`request`]s and
//! reads [`reply`]s, each after a [`message::Header`]; everything is little-endian and every
//! padding byte is zero.
//!
//! The codec works in both directions, so that the server in [`server`] and a client library share
//! it. The server offers the commands that need the VM's memory only; see [`command`] for the list.
#![deny(unsafe_code)]

pub mod command;
pub mod dispatch;
pub mod handshake;
pub mod message;
pub mod reply;
pub mod request;
pub mod server;
pub mod token;

/// The example of README.md, compiled as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;
