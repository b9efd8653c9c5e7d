// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Introspectors under a stock QEMU: what a VMM of ours does for its guest, the broker does here
//! over QMP.
//!
//! Towards the grants an [`Introspector`] is a VMM like any other: it has a [`Peer`], which is
//! called directly. Towards the guest a view is PCI devices ([`kvmmem_qemu::windows`]), which are
//! plugged in when a view is opened, on the thread of its opener, and unplugged when it ends, by
//! the introspector's one thread. One more view of a target is plugged in for the tokens that tools
//! in the guest get over KVMI ([`token_views`]).
//!
//! A guest can refuse to release a device, and then its QEMU keeps the target's memory mapped.
//! That cannot be helped from outside; so it is noticed, reported, and answered as the operator
//! wants ([`OnSilence`]). It costs that VM only: nothing that waits for it holds a lock that others
//! need.
//!
//! A QEMU that the guest has broken into may answer late, never, or send events without end. Ending
//! a view, removing an introspector and killing its QEMU have deadlines that none of this puts off:
//! the thread waits for no answer.
//!
//! [`Peer`]: crate::peer::Peer

mod add;
mod end;
mod free_slots;
mod handle;
mod inbox;
mod link;
pub(crate) mod list;
mod open;
mod qemu;
mod retire;
mod retired;
mod thread;
mod token_list;
mod token_view;
mod token_views;
mod unplug;
mod view;

pub use handle::Introspector;
pub use open::{OpenError, OpenView};
