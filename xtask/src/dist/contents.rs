// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is in each package.

use std::fs;

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use super::Release;
use super::package::Stage;
use crate::binaries::Binaries;
use crate::project;
use crate::tool::Tool;

/// A package as it is described to dpkg.
#[derive(Debug)]
pub(super) struct Package {
    pub(super) name: &'static str,
    pub(super) architecture: &'static str,
    pub(super) section: &'static str,
    /// `Depends` and its like.
    pub(super) relations: &'static [(&'static str, &'static str)],
    pub(super) summary: &'static str,
    pub(super) description: &'static str,
    /// File of the checkout, file of the system, mode. What is in `/etc` is a conffile.
    pub(super) files: &'static [(&'static str, &'static str, u32)],
    /// Adds what is made.
    pub(super) fill: fn(&Stage, &Release, &Binaries) -> Result<()>,
}

/// Something that makes users and groups from sysusers.d.
const SYSUSERS: &str = "systemd | systemd-standalone-sysusers | systemd-sysusers";

pub(super) const PACKAGES: [Package; 4] = [
    Package {
        name: "kvmmem",
        architecture: "amd64",
        section: "admin",
        relations: &[("Suggests", "kvmmemd, kvmmem-dkms")],
        summary: "look at one virtual machine's memory from another one",
        description: "The command line of kvmmem. On a KVM host it runs virtual machines, allows\n\
                      introspectors to look at targets and takes that back; in an introspector or\n\
                      on the host it reads, scans, dumps and watches a target's memory.",
        files: &[],
        fill: command_line,
    },
    Package {
        name: "kvmmemd",
        architecture: "amd64",
        section: "admin",
        relations: &[("Depends", SYSUSERS), ("Recommends", "kvmmem, logrotate")],
        summary: "broker that lets virtual machines look at each other's memory",
        description: "The host's service of kvmmem: it knows the virtual machines, speaks KVMI with\n\
                      introspection tools, keeps the grants and writes an audit log. It is started\n\
                      by its socket and runs without privileges.",
        files: &[
            ("packaging/kvmmemd/kvmmemd.service", "usr/lib/systemd/system/kvmmemd.service", 0o644),
            ("packaging/kvmmemd/kvmmemd.socket", "usr/lib/systemd/system/kvmmemd.socket", 0o644),
            ("packaging/kvmmemd/kvmmemd.sysusers", "usr/lib/sysusers.d/kvmmemd.conf", 0o644),
            ("packaging/kvmmemd/kvmmemd.toml", "etc/kvmmem/kvmmemd.toml", 0o644),
            ("packaging/kvmmemd/kvmmemd.logrotate", "etc/logrotate.d/kvmmemd", 0o644),
        ],
        fill: daemon,
    },
    Package {
        name: "kvmmem-dkms",
        architecture: "all",
        section: "kernel",
        relations: &[
            ("Depends", "dkms, systemd | systemd-standalone-sysusers | systemd-sysusers"),
            ("Recommends", "rustc"),
        ],
        summary: "kernel module that maps another virtual machine's memory (DKMS)",
        description: "The source of kvmmem.ko, which gives tools in an introspecting virtual machine\n\
                      the device /dev/kvmmem, and a udev rule for it. DKMS builds it for kernels\n\
                      from 7.3 on whose headers can build modules in Rust, and says what a kernel\n\
                      lacks that it cannot be built for.",
        files: &[
            (
                "packaging/kvmmem-dkms/kvmmem-dkms.sysusers",
                "usr/lib/sysusers.d/kvmmem-dkms.conf",
                0o644,
            ),
            ("kernel/60-kvmmem.rules", "usr/lib/udev/rules.d/60-kvmmem.rules", 0o644),
        ],
        fill: module,
    },
    Package {
        name: "libkvmmem-dev",
        architecture: "all",
        section: "libdevel",
        relations: &[("Depends", "linux-libc-dev"), ("Suggests", "kvmmem-dkms")],
        summary: "C header of /dev/kvmmem, with examples",
        description: "The interface of /dev/kvmmem for programs in C: structures, ioctls and errors.\n\
                      It is a header alone; there is no library to link against.",
        files: &[
            ("crates/kvmmem-abi/include/uapi/kvmmem.h", "usr/include/kvmmem.h", 0o644),
            ("examples/c/view.c", "usr/share/doc/libkvmmem-dev/examples/view.c", 0o644),
            (
                "examples/c/guest_endpoint.h",
                "usr/share/doc/libkvmmem-dev/examples/guest_endpoint.h",
                0o644,
            ),
            ("examples/c/marker.c", "usr/share/doc/libkvmmem-dev/examples/marker.c", 0o644),
        ],
        fill: header,
    },
];

fn command_line(stage: &Stage, _: &Release, binaries: &Binaries) -> Result<()> {
    stage.copy(&binaries.path("kvmmem"), "usr/bin/kvmmem", 0o755)?;
    pages(stage, binaries, |page| page.ends_with(".1"))?;
    let folder = manual(stage, binaries)?;
    for (from, to) in [
        ("kvmmem.bash", "usr/share/bash-completion/completions/kvmmem"),
        ("_kvmmem", "usr/share/zsh/vendor-completions/_kvmmem"),
        ("kvmmem.fish", "usr/share/fish/vendor_completions.d/kvmmem.fish"),
    ] {
        stage.copy(&folder.path().join(from), to, 0o644)?;
    }
    Ok(())
}

fn daemon(stage: &Stage, _: &Release, binaries: &Binaries) -> Result<()> {
    stage.copy(&binaries.path("kvmmemd"), "usr/sbin/kvmmemd", 0o755)?;
    pages(stage, binaries, |page| page == "kvmmemd.8")
}

/// The manual pages whose names are `wanted`; the last letter of each is its section.
fn pages(stage: &Stage, binaries: &Binaries, wanted: fn(&str) -> bool) -> Result<()> {
    let folder = manual(stage, binaries)?;
    for entry in fs::read_dir(folder.path())? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if let Some((_, section)) = name.rsplit_once('.').filter(|_| wanted(&name)) {
            stage.compress(
                &format!("usr/share/man/man{section}/{name}"),
                &fs::read(entry.path())?,
            )?;
        }
    }
    Ok(())
}

/// A folder with the manual pages and completions.
fn manual(stage: &Stage, binaries: &Binaries) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    Tool::new(binaries.path("kvmmem-manual"), stage.log()).arg(folder.path()).run()?;
    Ok(folder)
}

/// The sources as `kernel/Makefile` lays them out for DKMS.
fn module(stage: &Stage, _: &Release, _: &Binaries) -> Result<()> {
    // It makes the folders with a mode of its own, but those above them with the umask.
    let root = stage.place("usr/src/any")?;
    let root = root.ancestors().nth(3).context("no root")?;
    Tool::new("make", stage.log())
        .args(["-s", "-C", "kernel", "dkms-source"])
        .arg(format!("DESTDIR={}", root.display()))
        .dir(project::root())
        .run()
}

fn header(stage: &Stage, release: &Release, _: &Binaries) -> Result<()> {
    let text = fs::read_to_string(project::root().join("packaging/libkvmmem-dev/kvmmem.pc.in"))?;
    stage.write("usr/share/pkgconfig/kvmmem.pc", fill_in(&text, release).as_bytes(), 0o644)
}

/// Puts a release's facts into a text.
pub(super) fn fill_in(text: &str, release: &Release) -> String {
    text.replace("@VERSION@", &release.version).replace("@REPOSITORY@", &release.repository)
}

/// The file of this name that each package has.
pub(super) fn copyright(release: &Release) -> Result<String> {
    let read = |path: &str| {
        fs::read_to_string(project::root().join(path)).with_context(|| path.to_owned())
    };
    let licence = read("LICENSE-MIT")?;
    // Its title and its line of copyright are in the fields above.
    let terms = licence
        .lines()
        .skip_while(|line| !line.starts_with("Permission"))
        .map(|line| if line.is_empty() { " .\n".to_owned() } else { format!(" {line}\n") });
    let terms: String = terms.collect();
    Ok(fill_in(&read("packaging/copyright.in")?, release).replace("@MIT@\n", &terms))
}
