// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the broker tells an introspector's link.

use std::sync::Arc;

use kvmmem_client::vmm::{Target, ViewEvents};

use super::Introspector;
use super::unplug::Cause;
use super::view::lock;

impl ViewEvents for Introspector {
    fn revoke(&self, grant: u64) -> bool {
        lock(&self.state).unconfirmed.insert(grant);
        self.end(Cause::Revoked, |view| view.grant == grant);
        // Now, or when the last of them is gone.
        self.confirm_late(grant);
        false
    }

    fn gone(&self, target: u64) {
        self.end(Cause::Gone, |view| view.target == target);
    }

    fn changed(&self, target: &Arc<Target>) {
        for view in self.views().iter().filter(|view| view.target == target.id()) {
            if view.is_unmoved(target) {
                view.refresh(target.generation());
            }
        }
        self.end(Cause::Gone, |view| view.target == target.id() && !view.is_unmoved(target));
    }

    /// The broker knows the VM no more: it is no introspector, and can be made one again.
    fn lost(&self) {
        tracing::error!(
            introspector = self.name(),
            "an introspector has lost its registration and is taken out; add it again: kvmmem introspector add"
        );
        match self.broker.upgrade() {
            Some(broker) if broker.close_introspector(self.traits.vm) => {}
            // It was not added yet, or is being taken out already.
            _ => self.close(),
        }
    }
}
