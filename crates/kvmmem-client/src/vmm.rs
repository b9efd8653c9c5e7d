// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VMM's connection to the broker.
//!
//! The VM is registered as long as the [`VmmLink`] lives. A thread of its own takes what the broker
//! pushes, so that a token that was pushed to this VM is claimed without a round trip. When the
//! broker goes away, that thread connects and registers again, in the background; what the old
//! broker had pushed is void then, but every [`Target`] that is still in use stays usable.
//!
//! A second thread tells the VMM of what happens to its views ([`ViewEvents`]), so that answers go
//! on coming while the VMM is at work on an event. A third one has it answer for its vCPUs
//! ([`Vcpus`]).

mod cache;
mod error;
mod event_thread;
mod events;
mod link;
mod outbox;
mod reader;
mod state;
mod target;
mod tokens;
mod vcpu_thread;
mod vcpus;
mod views;

pub use error::RedeemError;
pub use events::ViewEvents;
pub use kvmmem_kvmi::token::Token;
pub use kvmmem_proto::map::Region;
pub use kvmmem_proto::message::{
    Caller, Change, Registration, SegmentRegister, VcpuAnswer, VcpuQuestion, VcpuRegisters,
    ViewCounters, VmIdentity,
};
pub use kvmmem_proto::scope::{Rights, Scope, Span};
pub use link::VmmLink;
pub use target::{PageGrant, Target, ViewGrant};
pub use vcpus::Vcpus;
