// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A limit on the introspector's memory bounds what its reads of untouched memory allocate.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use kvmmem_client::admin::GrantRequest;
use kvmmem_proto::scope::Rights;
use rustix::io::Errno;
use rustix::mount::{MountFlags, mount};

use crate::report::Report;
use crate::sparse::Sparse;
use crate::wait;
use crate::world::World;

const TARGET_BYTES: u64 = 1 << 30;
const LIMIT: u64 = 64 << 20;

/// A cgroup with a limit. Removed when dropped, if no process is left in it.
struct Cgroup(PathBuf);

impl Cgroup {
    fn with_limit(name: &str, bytes: u64) -> Result<Self> {
        let root = Path::new("/sys/fs/cgroup");
        match mount("cgroup2", root, "cgroup2", MountFlags::empty(), None) {
            Ok(()) | Err(Errno::BUSY) => {}
            Err(error) => return Err(error).context("cannot mount cgroup2"),
        }
        write(&root.join("cgroup.subtree_control"), "+memory")?;
        let this = Self(root.join(name));
        fs::create_dir(&this.0).context("cannot make a cgroup")?;
        write(&this.0.join("memory.max"), &bytes.to_string())?;
        Ok(this)
    }

    fn take(&self, pid: u32) -> Result<()> {
        write(&self.0.join("cgroup.procs"), &pid.to_string())
    }

    /// How often a process was killed for the limit.
    fn kills(&self) -> Result<u64> {
        let events = fs::read_to_string(self.0.join("memory.events"))?;
        let count = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        count.context("no count of kills")?.trim().parse().context("no count of kills")
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn write(path: &Path, text: &str) -> Result<()> {
    fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

pub(crate) fn memory_limit(world: &mut World, report: &mut Report) -> Result<()> {
    let sparse = Sparse::register(world, "sparse", TARGET_BYTES)?;
    let grant = world.grant_as(|usual| GrantRequest {
        target: sparse.name.to_owned(),
        rights: Rights::ReadOnly,
        ..usual
    })?;
    let mut tool = world.viewer()?;
    let view = tool.view(grant.token.words())?;
    let page = tool.must(&format!("mmap {view} 0 {TARGET_BYTES:#x} r shared"))?;
    let before = sparse.allocated()?;
    let cgroup = Cgroup::with_limit("kvmmem-e2e", LIMIT)?;
    cgroup.take(world.introspector()?.process.id())?;

    // The guest does not see the end of it.
    let _ = tool.begin(&format!("touch {page} {TARGET_BYTES:#x} 0x1000"));
    let introspector = world.introspector_mut()?;
    let ends = wait::until(|| Ok(!introspector.process.is_running()))?;
    report.check("reading all of an untouched target ends the introspector", ends, "");
    report.check("by the limit of its cgroup", cgroup.kills()? > 0, "");
    let filled = sparse.allocated()?.saturating_sub(before);
    report.check(
        "which is as much as it has allocated",
        filled <= LIMIT,
        format!("{} MiB of {}", filled >> 20, TARGET_BYTES >> 20),
    );
    report.check("the other target keeps running", world.target_mut()?.process.is_running(), "");
    drop(sparse);
    world.mend()
}
