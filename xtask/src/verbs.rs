// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Jobs for the scenarios' program on the test bed's host: scenarios, demo, benchmarks.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result, bail};

use crate::binaries::{Binaries, ProgramSet};
use crate::cache::Cache;
use crate::test_bed::Job;
use crate::tool::Tool;
use crate::{elf, project};

/// The scenarios' program.
const NAME: &str = "kvmmem-e2e";

/// The scenarios without the module, and the Debian releases whose kernels they boot.
const WITHOUT_MODULE: &str = "moduleless";
const KERNELS: [&str; 3] = ["bullseye", "bookworm", "trixie"];

/// How the names of the scenarios with VMs under stock QEMUs begin.
pub(crate) const STOCK_QEMUS: [&str; 2] = ["qemu", WITHOUT_MODULE];

/// The kernel of an emulated host: the guests' own.
const HOST: &str = "bed";

/// The same for VMs under stock QEMUs: Debian 13's own, Linux 6.12.
///
/// KVM of Linux 7.3 takes what QEMU's emulation of SVM leaves in EXITINTINFO for a failed delivery
/// of an event, where KVM must emulate an instruction right after an exception that the guest
/// handled (`machine/vcpu/internal_error.rs` of kvmmem-vmm tells more). kvmmem-vmm executes the
/// instruction again; QEMU stops the guest: "KVM internal error. Suberror: 3". A store to a
/// device's register or to a read-only view can meet this, and so can a load from a view whose
/// device is gone. Linux 6.12 does not look at EXITINTINFO there. The check `root stores into each
/// window's BAR` stores right after page faults: it fails on a host that has the fault.
const STOCK_QEMUS_HOST: &str = "trixie";

fn job(args: Vec<String>, minutes: u64) -> Job {
    Job {
        program: format!("bin/{NAME}"),
        args,
        files: Vec::new(),
        host: HOST,
        kernels: &[],
        limit: Duration::from_secs(minutes * 60),
    }
}

/// Scenarios by name, or all of them.
pub(crate) fn e2e(names: &[String], json: bool) -> Job {
    let mut args = vec!["run".to_owned()];
    args.extend(json.then(|| "--json".to_owned()));
    args.extend_from_slice(names);
    let boots_kernels =
        names.is_empty() || names.iter().any(|name| name.starts_with(WITHOUT_MODULE));
    let kernels: &[_] = if boots_kernels { &KERNELS } else { &[] };
    let boots_stock_qemus = names.is_empty()
        || names.iter().any(|name| STOCK_QEMUS.iter().any(|part| name.starts_with(part)));
    let host = if boots_stock_qemus { STOCK_QEMUS_HOST } else { HOST };
    // Some minutes; more of them beside other work.
    Job { host, kernels, ..job(args, 120) }
}

/// The scenarios, a line for each that begins with its name. Asking for them needs no host.
pub(crate) fn list() -> Result<String> {
    let cache = Cache::open()?;
    let binaries = Binaries::make(&cache, ProgramSet::All)?;
    Tool::new(binaries.path(NAME), &cache.fresh_log("list")?).arg("list").output()
}

/// Fails for a name that is not a scenario, before any VM boots.
pub(crate) fn check(names: &[String]) -> Result<()> {
    let list = if names.is_empty() { String::new() } else { list()? };
    // A whole part goes by what its names begin with.
    let is_in = |line: &str, name: &str| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with([' ', '_']))
    };
    let known = |name: &String| list.lines().any(|line| is_in(line, name));
    match names.iter().find(|name| !known(name)) {
        Some(name) => bail!("no scenario is named {name:?}; `cargo xtask e2e --list` lists them"),
        None => Ok(()),
    }
}

/// The demo.
pub(crate) fn demo() -> Job {
    job(vec!["demo".to_owned()], 10)
}

/// The measurements that need VMs, of one interface.
pub(crate) fn bench(what: &str, json: bool) -> Job {
    let mut args = vec!["bench".to_owned(), what.to_owned()];
    args.extend(json.then(|| "--json".to_owned()));
    let host = if STOCK_QEMUS.contains(&what) { STOCK_QEMUS_HOST } else { HOST };
    Job { host, ..job(args, 20) }
}

/// A measurement that needs no VM and so runs on this machine itself; returns its lines.
pub(crate) fn bench_here(package: &str, bench: &str, json: bool) -> Result<String> {
    let cache = Cache::open()?;
    let tool = Tool::new(project::cargo(), &cache.fresh_log("bench")?)
        .args(["bench", "--quiet", "--package", package, "--bench", bench, "--"])
        .dir(project::root());
    if json { tool.arg("--json").output() } else { tool.output() }
}

/// A user's program in the introspector.
pub(crate) fn try_program(files: Vec<PathBuf>, command: Vec<String>) -> Result<Job> {
    let (files, words) = bring(files, command)?;
    let args = ["try", "--"].map(str::to_owned).into_iter().chain(words).collect();
    Ok(Job { files, ..job(args, 20) })
}

/// A user's program on the host itself.
pub(crate) fn host(files: Vec<PathBuf>, command: Vec<String>, limit: Duration) -> Result<Job> {
    let (files, words) = bring(files, command)?;
    let mut words = words.into_iter();
    let program = format!("try/{}", words.next().unwrap_or_default());
    Ok(Job { program, args: words.collect(), files, host: HOST, kernels: &[], limit })
}

/// Adds a command's program to the files; in the command, it goes by its name alone.
fn bring(mut files: Vec<PathBuf>, command: Vec<String>) -> Result<(Vec<PathBuf>, Vec<String>)> {
    let mut words = command;
    let first = words.first_mut().context("no program given")?;
    let program = PathBuf::from(&*first);
    elf::check(&program)?;
    let name = program.file_name().with_context(|| format!("{first} names no file"))?;
    *first = name.to_string_lossy().into_owned();
    files.push(program);
    Ok((files, words))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stock_qemus_have_a_host_that_emulates_what_follows_an_exception() {
        let host = |names: &[&str]| {
            e2e(&names.iter().map(|&name| name.to_owned()).collect::<Vec<_>>(), false).host
        };
        assert_eq!(host(&[]), STOCK_QEMUS_HOST);
        for name in ["qemu", "qemu_v1", "moduleless_6_12"] {
            assert_eq!(host(&["map_basic", name]), STOCK_QEMUS_HOST, "{name}");
        }
        assert_eq!(host(&["map_basic", "views_basic"]), HOST);
        assert_eq!(bench("qemu", false).host, STOCK_QEMUS_HOST);
        assert_eq!(bench("views", false).host, HOST);
    }
}
