// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem mounts`: the file systems that a process of a Linux guest sees.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem_linux::mounts::{Mount, Mounts};
use serde::Serialize;

use crate::escape::escape;
use crate::linux::{Damage, Guest, process};
use crate::number::integer;
use crate::output::{Output, columns};

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// As this process sees them, in its namespace and from its root
    #[arg(long, value_name = "PID", default_value_t = 1, value_parser = integer(1..=u32::MAX))]
    pid: u32,
    #[command(flatten)]
    guest: Guest,
}

const AFTER_HELP: &str = "\
The columns are those of /proc/PID/mountinfo: ID, PARENT, DEVICE, ROOT (the folder of the file system that is mounted), POINT (where),
OPTIONS of the mount, TYPE and SOURCE, and ro or rw for the file system as a whole. Options that a type of file system has of its
own, and groups of mounts that share, are not shown. A process that has ended sees nothing.

Exit codes:
  0  done
  1  failed, standard error says why: there is no such process, or its mounts are damaged or changed while they were read
  2  the command line is wrong
  3  some of it could not be read, standard error says how much; the rest was printed
  4  the guest was restarted while it was read";

/// A mount, as JSON.
#[derive(Serialize)]
struct MountLine<'a> {
    id: u32,
    parent: u32,
    major: u32,
    minor: u32,
    root: &'a str,
    point: &'a str,
    /// `ro` or `rw` first.
    options: Vec<&'a str>,
    #[serde(rename = "type")]
    kind: &'a str,
    source: &'a str,
    /// Whether the file system as a whole forbids stores.
    super_read_only: bool,
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let table = self.guest.with_kernel("mounts", |kernel| {
            let task = process(kernel, self.pid, &self.guest.arguments())?;
            let mounts = Mounts::new(kernel)?.of(&task);
            mounts.with_context(|| format!("cannot list the mounts of process {}", self.pid))
        })?;
        let mut damage = Damage::default();
        damage.missing(table.lost, "mount", "mounts");
        if output.is_json() {
            table.mounts.iter().try_for_each(|mount| output.object(&MountLine::new(mount)))?;
            return self.guest.end(damage);
        }
        let header =
            ["ID", "PARENT", "DEVICE", "ROOT", "POINT", "OPTIONS", "TYPE", "SOURCE", "SUPER"];
        let rows: Vec<_> = std::iter::once(header.map(str::to_owned))
            .chain(table.mounts.iter().map(row))
            .collect();
        for line in columns(&rows) {
            output.line(line)?;
        }
        self.guest.end(damage)
    }
}

fn row(mount: &Mount) -> [String; 9] {
    let MountLine { id, parent, major, minor, root, point, options, kind, source, super_read_only } =
        MountLine::new(mount);
    [
        id.to_string(),
        parent.to_string(),
        format!("{major}:{minor}"),
        escape(root),
        escape(point),
        options.join(","),
        escape(kind),
        escape(source),
        writable(super_read_only).to_owned(),
    ]
}

fn writable(is_read_only: bool) -> &'static str {
    if is_read_only { "ro" } else { "rw" }
}

impl<'a> MountLine<'a> {
    fn new(mount: &'a Mount) -> Self {
        let options =
            [writable(mount.is_read_only)].into_iter().chain(mount.options.iter().copied());
        Self {
            id: mount.id,
            parent: mount.parent,
            major: mount.major,
            minor: mount.minor,
            root: &mount.root,
            point: &mount.point,
            options: options.collect(),
            kind: &mount.kind,
            source: &mount.source,
            super_read_only: mount.is_super_read_only,
        }
    }
}
