// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Views without the module, against views with it: the same tool in the same guest, which unloads
//! the module in between.

use anyhow::{Result, ensure};
use kvmmem_client::admin::GrantRequest;
use kvmmem_guest::Command;
use kvmmem_probe::Samples;

use super::row::{Row, find};
use super::views::{FROM, LENGTH, LIMIT};
use crate::qemu::Spec;
use crate::world::{PROBE, World};

/// Rounds of each series.
const ROUNDS: usize = 20;

/// Rows about an introspector that was added with the module.
pub(super) fn rows(world: &World, spec: &Spec) -> Result<Vec<Row>> {
    world.kvmmem(&["introspector", "remove", spec.name])?;
    let qemu = world.qemu(spec)?;
    let socket = qemu.socket().display().to_string();
    world.kvmmem(&["introspector", "add", "--trusted", "--qmp", &socket])?;
    let with = series(world, spec)?;
    // The module's last view is unplugged after its tool has ended.
    ensure!(world.settles(0)?, "a view does not end");
    qemu.agent.unload_module("kvmmem")?;
    let without = series(world, spec)?;
    let both = |name| Ok::<_, anyhow::Error>((find(&without, name)?, find(&with, name)?));
    let own = |name| find(&without, name);
    let slower = |title, name| {
        let (without, with) = both(name)?;
        Row::slower(title, 1.2, without, 1, with)
    };
    let faster = |title, goal, name| {
        let (without, with) = both(name)?;
        Row::faster(title, goal, without, with)
    };
    Ok(vec![
        slower("no module: token to first bytes, against the module", "attach, first bytes")?,
        faster("no module: 1 MiB by mapping, against the module", 0.9, "sequential, mapping")?,
        faster("no module: 1 MiB by read_at, against the module", 0.9, "sequential, read_at")?,
        faster("no module: 4 KiB by read_at, against the module", 0.5, "pages, read_at")?,
        faster("no module: 4 KiB by mapping, against the module", 0.5, "pages, mapping")?,
        faster("no module: 8 bytes by read_at, against the module", 0.5, "words, read_at")?,
        faster("no module: 8 bytes by mapping, against the module", 0.0, "words, mapping")?,
        Row::faster(
            "no module: 1 MiB by mapping, against own memory",
            0.9,
            own("sequential, mapping")?,
            own("sequential, own")?,
        )?,
        Row::faster(
            "no module: 4 KiB by mapping, against own memory",
            0.0,
            own("pages, mapping")?,
            own("pages, own")?,
        )?,
    ])
}

/// What a tool times.
fn series(world: &World, spec: &Spec) -> Result<Vec<Samples>> {
    let grant = world.grant_as(|usual| GrantRequest { uses: 100, ttl_ms: 3_600_000, ..usual })?;
    let token = grant.token.to_hex();
    let command = Command::new(PROBE).env("KVMMEM_TOKEN", token.as_str()).arg("reads");
    let command = command.args(["--from".to_owned(), FROM.to_string()]);
    let command = command.args(["--len".to_owned(), LENGTH.to_string()]);
    let command = command.args(["--rounds".to_owned(), ROUNDS.to_string()]);
    let output = world.qemu(spec)?.agent.run(&command, LIMIT)?;
    ensure!(output.status.success(), "the probe failed: {} {}", output.status, output.error_text());
    let lines = output.text();
    lines.lines().map(|line| Ok(serde_json::from_str(line)?)).collect()
}
