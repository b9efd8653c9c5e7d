// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What an introspector under a stock QEMU looks at, and how it comes to that.

use anyhow::{Context, Result};
use kvmmem_client::admin::{GrantRequest, NewGrant};
use kvmmem_proto::scope::Span;

use crate::qemu::Spec;
use crate::raw::Raw;
use crate::world::{Marker, TARGET, World};

/// Uses of a grant beyond those that a scenario counts on.
const SPARE: u32 = 4;

/// A target with a marker in it.
pub(in crate::scenarios) struct LookedAt {
    pub(in crate::scenarios) name: &'static str,
    /// The marker's first page.
    pub(in crate::scenarios) gpa: u64,
    pub(in crate::scenarios) hex: String,
    _marker: Option<Marker>,
}

impl LookedAt {
    /// `kvmmem vm`'s target, which has its 256 MiB in one file.
    pub(in crate::scenarios) fn ours(world: &mut World) -> Result<Self> {
        world.mend()?;
        let hex = world.marker()?.hex.clone();
        Ok(Self { name: TARGET, gpa: world.gpa()?, hex, _marker: None })
    }

    /// A VM under a stock QEMU, which is made a target.
    pub(in crate::scenarios) fn stock(world: &mut World, spec: &Spec) -> Result<Self> {
        let pid = world.boot_qemu(spec)?.process.id();
        if !world
            .targets()?
            .iter()
            .any(|target| target.identity.introspectable && target.identity.name == spec.name)
        {
            world.kvmmem(&["target", "add", "--pid", &pid.to_string(), "--name", spec.name])?;
        }
        let marker = world.place_marker(&world.qemu(spec)?.agent, 4)?;
        let gpa = *marker.gpas.first().context("the marker has no page")?;
        Ok(Self { name: spec.name, gpa, hex: marker.hex.clone(), _marker: Some(marker) })
    }

    /// A read-only grant for ten minutes; what a busy guest does not take up costs a use as well
    /// ([`open`]).
    pub(in crate::scenarios) fn grant(
        &self,
        world: &World,
        uses: u32,
        spans: Option<Vec<Span>>,
    ) -> Result<NewGrant> {
        let target = self.name.to_owned();
        world.grant_as(|usual| GrantRequest {
            target,
            uses: uses + SPARE,
            spans,
            ttl_ms: 600_000,
            ..usual
        })
    }

    /// Whether its marker is what the host sees.
    pub(in crate::scenarios) fn is_whole(&self, world: &World) -> Result<bool> {
        let grant = self.grant(world, 1, None)?;
        let output = std::process::Command::new(world.bed.bin("kvmmem"))
            .args(["read", &format!("{:#x}", self.gpa), "32", "--json", "--broker"])
            .arg(world.socket())
            .env("KVMMEM_TOKEN", grant.token.to_hex().as_str())
            .output()
            .context("cannot run kvmmem")?;
        Ok(String::from_utf8_lossy(&output.stdout).contains(&self.hex))
    }
}

/// The name of a VM as an introspector: as a target it may have its own.
pub(in crate::scenarios) fn name_of(spec: &Spec) -> String {
    format!("{}-looks", spec.name)
}

/// Boots the VM and makes it an introspector with this policy; returns the broker's answer as JSON.
pub(in crate::scenarios) fn add(
    world: &mut World,
    spec: &Spec,
    on_silence: &str,
) -> Result<serde_json::Value> {
    let socket = world.boot_qemu(spec)?.socket().display().to_string();
    let name = name_of(spec);
    if world.has(&name)? {
        world.kvmmem(&["introspector", "remove", &name])?;
    }
    let words = [
        "introspector",
        "add",
        "--qmp",
        &socket,
        "--name",
        &name,
        "--on-silence",
        on_silence,
        "--json",
    ];
    let added = world.kvmmem(&words)?;
    serde_json::from_str(&added).with_context(|| format!("introspector add says {added:?}"))
}

/// Opens a view in the VM; the slots of its connection and its device. A guest that gets little of
/// the CPUs does not take the view up in the broker's time; then the tool tries again, as the
/// refusal "busy" asks for, until the grant is used up.
pub(in crate::scenarios) fn open(tool: &mut Raw, grant: &NewGrant) -> Result<(String, String)> {
    loop {
        match tool.open_view(&grant.token)? {
            Ok(slots) => return Ok(slots),
            Err(words) if words.contains(r#""refusal":"busy""#) => {}
            Err(words) => anyhow::bail!("the connection refuses: {words}"),
        }
    }
}
