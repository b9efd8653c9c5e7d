// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Pages of the table, each within a packet.

use std::time::Instant;

use kvmmem_proto::message::{Cursor, GrantState, Origin, ViewInfo};
use kvmmem_proto::scope::Scope;

use super::grant::Grant;
use super::{Grants, Holder, View};

/// What a page may take up, in bytes of JSON.
const PAGE: usize = 56 * 1024;

/// What a grant takes up without its spans and its views, at most, and what a span and a view do.
const GRANT: usize = 768;
const SPAN: usize = 64;
const VIEW: usize = 512;

/// A grant, as a list shows it; the target's name is the registry's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// Its number.
    pub id: u64,
    /// Number of the target.
    pub target: u64,
    /// What it allows.
    pub scope: Scope,
    /// How often its token may still be used.
    pub uses_left: u32,
    /// How long it may still be used, milliseconds.
    pub expires_in_ms: u64,
    /// Who may use it.
    pub holder: Holder,
    /// The operator's words.
    pub label: Option<String>,
    /// Who asked for it.
    pub origin: Origin,
    /// Whether its token can be used.
    pub state: GrantState,
    /// What it has opened, and is still open.
    pub views: Vec<ViewInfo>,
}

impl Grants {
    /// The grants and views behind `after`, as many as fit in a packet, and where the next page
    /// starts.
    pub(crate) fn list(&mut self, now: Instant, after: Cursor) -> (Vec<Listed>, Option<Cursor>) {
        self.advance(now);
        let mut page: Vec<Listed> = Vec::new();
        let mut used = 0;
        for (id, grant) in self.grants.range(after.grant..) {
            let first = if *id == after.grant { after.view.saturating_add(1) } else { 0 };
            let size = GRANT + SPAN * grant.terms.scope.spans.as_ref().map_or(0, Vec::len);
            if used + size > PAGE {
                return (page, Some(Cursor { grant: *id, view: 0 }));
            }
            used += size;
            let mut listed = listed(*id, grant, now);
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

fn listed(id: u64, grant: &Grant, now: Instant) -> Listed {
    let left = grant.expires.saturating_duration_since(now);
    Listed {
        id,
        target: grant.terms.target,
        scope: grant.terms.scope.clone(),
        uses_left: grant.uses_left,
        expires_in_ms: u64::try_from(left.as_millis()).unwrap_or(u64::MAX),
        holder: grant.terms.holder,
        label: grant.terms.label.clone(),
        origin: grant.terms.origin,
        state: grant.state(now),
        views: Vec::new(),
    }
}
