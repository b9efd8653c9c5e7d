// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The grants as aligned columns.

use std::time::Duration;

use kvmmem_client::admin::{GrantInfo, GrantState, Origin, Scope, ViewInfo};

use crate::escape::escape;
use crate::output::columns;
use crate::time::duration;

/// A line for each grant, and below it one for each of its views.
pub(super) fn lines(grants: &[GrantInfo]) -> Vec<String> {
    let header = [
        "GRANT", "TARGET", "RIGHTS", "RANGES", "STATE", "USES", "EXPIRES", "FROM", "HOLDER",
        "LABEL",
    ];
    let rows: Vec<_> =
        std::iter::once(header.map(str::to_owned)).chain(grants.iter().map(row)).collect();
    let views = std::iter::once(&[][..]).chain(grants.iter().map(|grant| &grant.views[..]));
    let mut lines = Vec::new();
    for (line, views) in columns(&rows).into_iter().zip(views) {
        lines.push(line);
        lines.extend(views.iter().map(view));
    }
    lines
}

fn row(grant: &GrantInfo) -> [String; 10] {
    let none = || "-".to_owned();
    let is_active = grant.state == GrantState::Active;
    let state = match grant.state {
        GrantState::Active => "active",
        GrantState::Spent => "spent",
        GrantState::Expired => "expired",
        GrantState::Revoked => "revoked",
    };
    let origin = match grant.origin {
        Origin::Kvmi => "kvmi",
        Origin::Operator => "operator",
    };
    [
        grant.id.to_string(),
        escape(&grant.target),
        grant.scope.rights.to_string(),
        ranges(&grant.scope),
        state.to_owned(),
        grant.uses_left.to_string(),
        if is_active { duration(Duration::from_millis(grant.expires_in_ms)) } else { none() },
        origin.to_owned(),
        grant.holder.map_or_else(none, |holder| holder.to_string()),
        grant.label.as_deref().map_or_else(none, escape),
    ]
}

fn ranges(scope: &Scope) -> String {
    match scope.spans.as_deref() {
        None => "all RAM".to_owned(),
        Some([]) => "none".to_owned(),
        Some([first]) => first.to_string(),
        Some([first, more @ ..]) => format!("{first} and {} more", more.len()),
    }
}

fn view(view: &ViewInfo) -> String {
    let ViewInfo { id, by, pid, uid, comm, attached_ms, counters, .. } = view;
    let since = duration(Duration::from_millis(*attached_ms));
    let (by, comm) = (escape(by), escape(comm));
    let mut line = format!("  -> view {id}  {by}: {comm} (pid {pid}, uid {uid})  for {since}");
    line += &format!("  seeks {}, refused writes {}", counters.seeks, counters.refused_writes);
    line
}

#[cfg(test)]
mod tests {
    use kvmmem_client::admin::{Rights, Span, ViewCounters};
    use uuid::Uuid;

    use super::*;

    #[test]
    fn the_table_is_aligned_and_cannot_drive_the_terminal() {
        let span = |gpa, len| Span { gpa, len };
        let grant = GrantInfo {
            id: 7,
            target: "vic\x1b[2Jtim".to_owned(),
            target_uuid: Uuid::nil(),
            scope: Scope {
                rights: Rights::ReadOnly,
                spans: Some(vec![span(0x1000, 0x1000), span(0x4000, 0x1000)]),
            },
            uses_left: 2,
            expires_in_ms: 61_500,
            holder: None,
            label: Some("on\rcall".to_owned()),
            origin: Origin::Operator,
            state: GrantState::Active,
            views: vec![ViewInfo {
                id: 3,
                by: "looker".to_owned(),
                by_uuid: Some(Uuid::nil()),
                pid: 42,
                uid: 1000,
                comm: "sc\nan".to_owned(),
                attached_ms: 2500,
                counters: ViewCounters { seeks: 5, refused_writes: 1 },
            }],
        };
        let spent = GrantInfo {
            id: 12,
            target: "x".to_owned(),
            scope: Scope { rights: Rights::ReadWrite, spans: None },
            state: GrantState::Spent,
            uses_left: 0,
            label: None,
            origin: Origin::Kvmi,
            views: vec![],
            ..grant.clone()
        };
        assert_eq!(
            lines(&[grant, spent]),
            [
                "GRANT  TARGET           RIGHTS  RANGES                     STATE   USES  EXPIRES  FROM      HOLDER  LABEL",
                "7      vic\\u{1b}[2Jtim  ro      0x1000..0x2000 and 1 more  active  2     1m 1s    operator  -       on\\rcall",
                "  -> view 3  looker: sc\\nan (pid 42, uid 1000)  for 2s  seeks 5, refused writes 1",
                "12     x                rw      all RAM                    spent   0     -        kvmi      -       -",
            ]
        );
    }
}
