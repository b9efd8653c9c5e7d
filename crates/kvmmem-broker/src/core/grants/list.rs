// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pages of the table, each within a packet.

use std::time::Instant;

use kvmmem_proto::message::{Cursor, GrantInfo, ViewInfo};
use uuid::Uuid;

use super::grant::{Grant, Holder, View};
use super::table::Grants;

/// What a page may take up, in bytes of JSON.
const PAGE: usize = 56 * 1024;

/// What a grant takes up without its spans and its views, at most, and what a span and a view do.
const GRANT: usize = 768;
const SPAN: usize = 64;
const VIEW: usize = 512;

/// What a list shows of a grant that the table of VMs knows.
#[derive(Clone, Debug)]
pub(crate) struct Names {
    pub(crate) target: String,
    pub(crate) target_uuid: Uuid,
    /// The only introspector that may use it.
    pub(crate) holder: Option<Uuid>,
}

impl Grants {
    /// The grants and views behind `after`, as many as fit in a packet, and where the next page
    /// starts.
    pub(crate) fn list(
        &mut self,
        now: Instant,
        after: Cursor,
        names: impl Fn(u64, Holder) -> Option<Names>,
    ) -> (Vec<GrantInfo>, Option<Cursor>) {
        self.advance(now);
        let mut page: Vec<GrantInfo> = Vec::new();
        let mut used = 0;
        for (id, grant) in self.grants.range(after.grant..) {
            let Some(names) = names(grant.terms.target, grant.terms.holder) else { continue };
            let first = if *id == after.grant { after.view.saturating_add(1) } else { 0 };
            let size = GRANT + SPAN * grant.terms.scope.spans.as_ref().map_or(0, Vec::len);
            if used + size > PAGE {
                return (page, Some(Cursor { grant: *id, view: 0 }));
            }
            used += size;
            let mut listed = grant.info(*id, names, now);
            let mut last = first.saturating_sub(1);
            for view in grant.views.range(first..).filter_map(|view| self.views.get(view)) {
                if used + VIEW > PAGE {
                    page.push(listed);
                    return (page, Some(Cursor { grant: *id, view: last }));
                }
                used += VIEW;
                last = view.id;
                listed.views.push(view.info(now));
            }
            page.push(listed);
        }
        (page, None)
    }
}

impl View {
    fn info(&self, now: Instant) -> ViewInfo {
        let open = now.saturating_duration_since(self.since);
        ViewInfo {
            id: self.id,
            by: self.by.clone(),
            by_uuid: self.by_uuid,
            pid: self.caller.pid,
            uid: self.caller.uid,
            comm: self.caller.comm.clone(),
            attached_ms: u64::try_from(open.as_millis()).unwrap_or(u64::MAX),
            counters: self.counters,
        }
    }
}

impl Grant {
    fn info(&self, id: u64, names: Names, now: Instant) -> GrantInfo {
        let left = self.expires.saturating_duration_since(now);
        GrantInfo {
            id,
            target: names.target,
            target_uuid: names.target_uuid,
            scope: self.terms.scope.clone(),
            uses_left: self.uses_left,
            expires_in_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
            holder: names.holder,
            label: self.terms.label.clone(),
            origin: self.terms.origin,
            state: self.state(now),
            views: Vec::new(),
        }
    }
}
