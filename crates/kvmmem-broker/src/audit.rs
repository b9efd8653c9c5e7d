// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The audit log: who did what to whom, as `tracing` events of target [`TARGET`].
//!
//! What a guest or a tool can cause at will is limited to so many lines a second for each kind of event; the field
//! `suppressed` of the next line tells how many were left out. Tokens are never written.

use std::time::Instant;

use crate::limit::RateLimit;
use crate::peer::Credentials;
use crate::registry::Vm;

/// The `target` of every event of the audit log.
pub const TARGET: &str = "audit";

/// Lines a second for each kind of event that can be caused at will.
const PER_SECOND: u32 = 50;

/// Writes one line unless its kind has had its share.
macro_rules! limited {
    ($event:literal, $($field:tt)*) => {{
        static LIMIT: RateLimit = RateLimit::new(PER_SECOND);
        if let Some(suppressed) = LIMIT.allow(Instant::now()) {
            tracing::info!(target: TARGET, event = $event, suppressed, $($field)*);
        }
    }};
}

/// A VM was registered.
pub(crate) fn registered(vm: &Vm) {
    let (registration, peer) = (vm.registration(), vm.peer().credentials());
    limited!(
        "registered",
        vm = vm.id(),
        name = registration.name,
        uuid = %registration.uuid,
        cid = registration.cid,
        introspectable = registration.introspectable,
        introspector = registration.introspector,
        pid = peer.pid,
        uid = peer.uid,
    );
}

/// A VM's VMM went away.
pub(crate) fn gone(vm: &Vm) {
    limited!("gone", vm = vm.id(), name = vm.registration().name);
}

/// A request was refused.
pub(crate) fn refused(peer: Credentials, message: &str) {
    limited!("refused", pid = peer.pid, uid = peer.uid, message);
}

/// A hook was made or undone.
pub(crate) fn hooked(vm: &Vm, endpoint: &crate::endpoint::Endpoint, on: bool, peer: Credentials) {
    let name = &vm.registration().name;
    limited!("hook", vm = vm.id(), name, %endpoint, on, pid = peer.pid, uid = peer.uid);
}

/// A tool was connected to a target.
pub(crate) fn connected(vm: &Vm, endpoint: &crate::endpoint::Endpoint) {
    limited!("connected", vm = vm.id(), name = vm.registration().name, %endpoint);
}

/// A tool's connection ended.
pub(crate) fn disconnected(vm: &Vm, endpoint: &crate::endpoint::Endpoint, reason: &str) {
    limited!("disconnected", vm = vm.id(), name = vm.registration().name, %endpoint, reason);
}

/// A tool got a token, which only `holder` may use, or anybody where there is none.
pub(crate) fn minted(vm: &Vm, endpoint: &crate::endpoint::Endpoint, holder: Option<u64>) {
    limited!("minted", vm = vm.id(), name = vm.registration().name, %endpoint, holder);
}

/// A tool got no token.
pub(crate) fn not_minted(vm: &Vm, endpoint: &crate::endpoint::Endpoint, reason: &str) {
    limited!("not_minted", vm = vm.id(), name = vm.registration().name, %endpoint, reason);
}

/// A VM used a token.
pub(crate) fn used(target: u64, by: &Vm) {
    limited!("used", vm = target, by = by.id(), by_name = by.registration().name);
}
