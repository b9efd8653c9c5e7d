// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the broker tells an introspector's link.

use std::sync::Arc;

use super::Introspector;
use super::take_back::Cause;
use super::view::lock;
use crate::link::{Target, ViewEvents};

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
        let regions = |view: &super::View| view.scope.regions(target.map());
        for view in self.views().iter().filter(|view| view.target == target.id()) {
            if regions(view) == view.regions {
                view.refresh();
            }
        }
        self.end(Cause::Gone, |view| view.target == target.id() && regions(view) != view.regions);
    }

    fn lost(&self) {
        self.end(Cause::Gone, |_| true);
    }
}
