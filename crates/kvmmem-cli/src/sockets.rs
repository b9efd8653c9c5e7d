// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem sockets`: the sockets of a Linux guest, and the processes that hold them.

use std::collections::HashMap;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem_linux::Kernel;
use kvmmem_linux::files::Files;
use kvmmem_linux::sockets::{Ends, Kind, Socket, Sockets};
use kvmmem_linux::tasks::{Tasks, Which};
use serde::Serialize;

use crate::linux::{Damage, Guest, collect};
use crate::number::Hex;
use crate::output::Output;
use crate::table::{Table, mark, or_unknown};

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    #[command(flatten)]
    table: Table,
    #[command(flatten)]
    guest: Guest,
}

const AFTER_HELP: &str = "\
TCP, UDP and raw sockets of IPv4 and IPv6 and unix sockets, of all network namespaces. NETNS is the inode of the namespace, as in
/proc/PID/ns/net. A name that begins with @ is in the abstract namespace; the PEER of a unix socket is the inode of the socket
that it is connected to. The port of a raw socket is its protocol's number. A connection that was not accepted yet, or that
its process has closed, has inode 0 and no process. A ! after a state says that the socket changed whenever it was read; a ?, that some
of it could not be read (\"damaged\" in JSON).

Exit codes:
  0  done
  1  failed, standard error says why: no kernel was found, or one without symbols or types, or its tables are damaged
  2  the command line is wrong
  3  some of it could not be read, standard error says how much; the rest was printed
  4  the guest was restarted while it was read";

/// A socket, as JSON.
#[derive(Serialize)]
struct SocketLine<'a> {
    protocol: &'static str,
    #[serde(rename = "type", skip_serializing_if = "Option::is_none")]
    kind: Option<&'static str>,
    state: &'static str,
    local: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    peer_inode: Option<u64>,
    uid: Option<u32>,
    inode: u64,
    netns: Option<u32>,
    processes: &'a [Holder],
    /// Where its `struct sock` is.
    sock: Hex,
    torn: bool,
    damaged: bool,
}

/// A process that holds a socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Holder {
    pid: u32,
    fd: u32,
    comm: String,
}

/// Processes that hold a socket, by its inode.
type Holders = HashMap<u64, Vec<Holder>>;

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let (sockets, holders, damage) = self.guest.with_kernel("sockets", |kernel| {
            let mut damage = Damage::default();
            let listed = collect(|| Sockets::new(kernel)).context("cannot list the sockets")?;
            damage.missing(
                listed.lost,
                "socket or part of their tables",
                "sockets or parts of their tables",
            );
            damage.marked(listed.rows.iter().map(|socket| socket.is_damaged));
            let mut sockets = listed.rows;
            sockets.sort_by_key(|socket| {
                (socket.protocol_name(), socket.netns, socket.inode, socket.gva)
            });
            Ok((sockets, holders(kernel, &mut damage)?, damage))
        })?;
        let held = |socket: &Socket| holders.get(&socket.inode).map_or(&[][..], Vec::as_slice);
        let header = ["PROTOCOL", "STATE", "LOCAL", "PEER", "UID", "INODE", "NETNS", "PROCESSES"];
        let line = |socket| SocketLine::new(socket, held(socket));
        self.table.print(output, &sockets, line, header, |socket| row(socket, held(socket)))?;
        self.guest.end(damage)
    }
}

/// The processes with open sockets.
fn holders(kernel: &Kernel<'_>, damage: &mut Damage) -> Result<Holders> {
    let tasks = match collect(|| Tasks::new(kernel, Which::Processes)) {
        // The sockets are known without the processes.
        Err(error) if error.is_local() => {
            damage.missing(1, "list of processes", "lists of processes");
            return Ok(Holders::new());
        }
        tasks => tasks.context("cannot list the processes")?,
    };
    damage.missing(tasks.lost, "process", "processes");
    let files = Files::new(kernel)?;
    let (mut holders, mut cut) = (Holders::new(), 0);
    for task in tasks.rows {
        let open = match collect(|| Ok(std::iter::once(files.of(&task)))) {
            Ok(open) => open.rows,
            Err(error) if error.is_local() => {
                cut += 1;
                continue;
            }
            Err(error) => {
                return Err(error)
                    .with_context(|| format!("cannot list the files of process {}", task.pid));
            }
        };
        cut += open
            .iter()
            .filter(|open| open.is_cut || open.files.iter().any(|file| file.is_damaged))
            .count();
        for file in open.into_iter().flat_map(|open| open.files) {
            if let Some(inode) = file.path.socket() {
                let holder = Holder { pid: task.pid, fd: file.fd, comm: task.comm.clone() };
                holders.entry(inode).or_default().push(holder);
            }
        }
    }
    damage.missing(cut, "process's open files", "processes' open files");
    Ok(holders)
}

fn row(socket: &Socket, holders: &[Holder]) -> [String; 8] {
    let or_none = |text: Option<String>| text.unwrap_or_else(|| "-".to_owned());
    let (local, peer) = match &socket.ends {
        Ends::Inet { local, peer } => (local.to_string(), peer.to_string()),
        Ends::Unix { path, peer, .. } => {
            (or_none(path.clone()), or_none(peer.map(|inode| inode.to_string())))
        }
    };
    let protocol = socket.protocol_name();
    let holders = holders.iter().map(|holder| format!("{}/{}", holder.pid, holder.comm));
    [
        kind(socket).map_or_else(|| protocol.to_owned(), |kind| format!("{protocol}-{kind}")),
        format!("{}{}", socket.state.name(), mark(socket.is_torn, socket.is_damaged)),
        local,
        peer,
        or_none(socket.uid.map(|uid| uid.to_string())),
        socket.inode.to_string(),
        or_unknown(socket.netns),
        or_none(Some(holders.collect::<Vec<_>>().join(",")).filter(|text| !text.is_empty())),
    ]
}

fn kind(socket: &Socket) -> Option<&'static str> {
    match socket.ends {
        Ends::Inet { .. } => None,
        Ends::Unix { kind, .. } => Some(match kind {
            Kind::Stream => "stream",
            Kind::Datagram => "dgram",
            Kind::SeqPacket => "seqpacket",
        }),
    }
}

impl<'a> SocketLine<'a> {
    fn new(socket: &Socket, processes: &'a [Holder]) -> Self {
        let (local, peer, peer_inode) = match &socket.ends {
            Ends::Inet { local, peer } => (Some(local.to_string()), Some(peer.to_string()), None),
            Ends::Unix { path, peer, .. } => (path.clone(), None, *peer),
        };
        Self {
            protocol: socket.protocol_name(),
            kind: kind(socket),
            state: socket.state.name(),
            local,
            peer,
            peer_inode,
            uid: socket.uid,
            inode: socket.inode,
            netns: socket.netns,
            processes,
            sock: Hex(socket.gva),
            torn: socket.is_torn,
            damaged: socket.is_damaged,
        }
    }
}
