// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Retires ports, and uses them again: see [`RetiredPorts`](super::retired::RetiredPorts).

use std::sync::Arc;

use kvmmem_qemu::windows::plug;
use serde_json::json;

use super::handle::Introspector;
use super::view::View;
use crate::audit::Event;
use crate::sync::lock;

impl Introspector {
    /// Retires the buses of a view whose devices are gone, unless nothing of it is mapped in the
    /// guest any more.
    pub(super) fn retire(&self, view: &View) {
        let resets = self.monitor.counts().resets;
        if view.is_released() || view.since.resets < resets {
            return;
        }
        for mark in lock(&view.plug).leave_marks() {
            tracing::warn!(
                introspector = self.name(),
                view = view.number,
                bus = mark.bus,
                "a tool has not acknowledged the end of its view: the PCI bus is not used before a reset of the introspector"
            );
            let vm = self.link.vm();
            let (number, grant, bus) = (view.number, view.grant, mark.bus.as_str());
            self.audit(|audit| audit.write(Event::PortRetired { vm, view: number, grant, bus }));
            lock(&self.state).retired.add(mark, resets);
        }
    }

    /// Uses the buses again that were retired before the VM was reset this often, as soon as QEMU
    /// has removed their marks.
    pub(super) fn use_again(self: &Arc<Self>, resets: u64) {
        let marks = lock(&self.state).retired.before(resets);
        for mark in marks {
            let it = Arc::downgrade(self);
            let id = mark.id.clone();
            self.monitor.send("object-del", &json!({ "id": id }), move |answer| {
                // Else the bus stays retired, until the next reset.
                if let Some(it) = it.upgrade()
                    && (answer.is_ok() || plug::is_not_found(&answer))
                {
                    lock(&it.state).retired.remove(&mark);
                }
            });
        }
    }
}
