// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem proxy`: in an introspector without the module, attaches views for tools that are not
//! root.
//!
//! Only root can map the devices of views, and each process that has mapped one may keep it past
//! the view's end. So the proxy alone maps them, and copies for the tools. It speaks what a broker
//! speaks to processes of the host whose target has private RAM ([`kvmmem_proto::copy`]), at the
//! same socket: tools need nothing else. Who may connect is the socket's group; what a token opens
//! is decided by the host's broker.

mod channel;
mod closer;
mod connection;
mod connection_limit;
#[cfg(test)]
mod tests;
mod tool;

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::mpsc::channel;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use kvmmem::View;
use kvmmem::view::{check_guest_endpoint, default_socket};
use kvmmem_proto::credentials::{Credentials, group_id};
use kvmmem_proto::listener;
use kvmmem_proto::message::{FromBroker, Refusal};
use kvmmem_proto::packet::{PacketSocket, Wait};
use kvmmem_sys::socket::peer_credentials;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde::Serialize;

use self::closer::Closer;
use self::connection::Connection;
use self::connection_limit::ToolSlot;
use self::tool::Attach;
use crate::interrupt::Interrupt;
use crate::output::Output;

/// How long the host has for refusing this machine.
const REFUSAL_LIMIT: Duration = Duration::from_millis(500);

/// How long the tools' threads may take to end, and how often it is looked.
const END_LIMIT: Duration = Duration::from_secs(5);
const END_LOOK: Duration = Duration::from_millis(2);

/// How long a packet to a tool that does not read is waited for.
const SEND_LIMIT: Duration = Duration::from_secs(5);

/// How long to wait when the system has no file descriptors or memory left.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(100);

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Where to listen [default: where tools look, $KVMMEM_BROKER or /run/kvmmem/kvmmemd.sock]
    #[arg(long, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// Name or number of the group whose members may attach views [default: root alone]
    #[arg(long)]
    group: Option<String>,
}

const AFTER_HELP: &str = "\
SIGINT and SIGTERM end it, and with it the views of its tools.";

const NO_INTROSPECTOR: &str = "no host opens views for this machine, so it is not an introspector; run kvmmem proxy in one (on its host: kvmmem \
     introspector add --trusted), or see kvmmem doctor --role guest";

#[derive(Serialize)]
struct ListeningLine<'a> {
    listening: &'a Path,
}

impl Arguments {
    pub(crate) fn run(self, output: &mut Output) -> Result<ExitCode> {
        if kvmmem::device::default_path().exists() {
            bail!("the module kvmmem is loaded: tools attach views by it and need no proxy");
        }
        // On another machine its socket would be in the place of a broker's.
        check_guest_endpoint(REFUSAL_LIMIT).context(NO_INTROSPECTOR)?;
        if !rustix::process::geteuid().is_root() {
            bail!("only root can map the devices of views: run kvmmem proxy as root");
        }
        let path = self.socket.unwrap_or_else(default_socket);
        let group = self.group.as_deref().map(group_id).transpose();
        let group = group.context("cannot find the group")?;
        let interrupt = Interrupt::catch()?;
        raise_fd_limit();
        if let Some(folder) = path.parent() {
            let context = || format!("cannot make {}", folder.display());
            std::fs::create_dir_all(folder).with_context(context)?;
        }
        let (listener, _lock) = listener::bind(&path, group)?;
        match output.is_json() {
            true => output.object(&ListeningLine { listening: &path })?,
            false => output.line(format!("listening at {}", path.display()))?,
        }
        let attach: Arc<Attach> = Arc::new(View::attach_without_module_for);
        let mut tools = Tools::new(group.is_some(), attach);
        let served = accept(&listener, &interrupt, &mut tools);
        let _ = std::fs::remove_file(&path);
        if let left @ 1.. = tools.end(END_LIMIT) {
            tracing::warn!(left, "tools' threads do not end; their views have");
        }
        close_aside(listener);
        served.context("cannot wait for tools")?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Closes what is left at the proxy's end on one thread: a packet that was not received may hold a
/// file whose last close blocks.
fn close_aside(sockets: impl Send + 'static) {
    let close = std::thread::Builder::new().name("close".into());
    // Without a thread they are closed here.
    let _ = close.spawn(move || drop(sockets));
}

/// Each tool takes several file descriptors, and each refused one at least one until it is closed:
/// the usual soft limit of 1,024 is too low.
fn raise_fd_limit() {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Serves tools until a signal comes.
fn accept(listener: &OwnedFd, interrupt: &Interrupt, tools: &mut Tools) -> io::Result<()> {
    while !interrupt.has_come() {
        let mut files =
            [PollFd::new(interrupt, PollFlags::IN), PollFd::new(listener, PollFlags::IN)];
        match poll(&mut files, None) {
            Ok(_) => {}
            Err(Errno::INTR) => continue,
            Err(error) => return Err(error.into()),
        }
        match accept_with(listener, SocketFlags::CLOEXEC) {
            Ok(fd) => {
                if let Err(error) = tools.admit(fd) {
                    tracing::warn!(%error, "cannot serve a tool");
                }
            }
            Err(Errno::MFILE | Errno::NFILE | Errno::NOMEM | Errno::NOBUFS) => {
                tracing::warn!("no file descriptor or memory is left for a tool");
                interrupt.wait(EXHAUSTED_PAUSE)?;
            }
            // It was gone before it was accepted.
            Err(_) => {}
        }
    }
    Ok(())
}

/// The tools that are connected.
struct Tools {
    /// Whether the socket's mode says who may connect; otherwise only root may.
    admits_all: bool,
    attach: Arc<Attach>,
    /// How long a tool may take to ask for a view.
    ask_limit: Duration,
    running: Vec<Running>,
    closer: Closer,
}

/// A tool, until none of its threads is left.
struct Running {
    slot: Arc<ToolSlot>,
    /// The tool's threads own it. The last one closes the socket, and with it the files in packets
    /// that were not received, which may block.
    connection: Weak<Connection>,
}

impl Tools {
    fn new(admits_all: bool, attach: Arc<Attach>) -> Self {
        let (running, closer) = (Vec::new(), Closer::default());
        Self { admits_all, attach, ask_limit: tool::ASK_LIMIT, running, closer }
    }

    /// Asks the kernel who has connected.
    fn admit(&mut self, fd: OwnedFd) -> io::Result<()> {
        let peer = peer_credentials(&fd)?;
        self.admit_as(fd, Credentials { pid: peer.pid.unwrap_or(0), uid: peer.uid })
    }

    /// Starts a thread for a tool, or refuses it.
    fn admit_as(&mut self, fd: OwnedFd, credentials: Credentials) -> io::Result<()> {
        let socket = PacketSocket::accepted(fd, SEND_LIMIT).map_err(io::Error::other)?;
        let connection = Arc::new(Connection::new(socket, credentials));
        if let Err((refusal, message)) = self.find_slot(credentials) {
            // A tool that does not read it does without.
            let refused = FromBroker::Refused { id: 0, refusal, message };
            let _ = connection.socket.send(&refused, &[], Wait::No);
            connection.socket.shut_down();
            self.closer.close(connection);
            return Ok(());
        }
        let (attach, ask_limit) = (Arc::clone(&self.attach), self.ask_limit);
        let slot = Arc::clone(&connection.slot);
        self.running.push(Running { slot, connection: Arc::downgrade(&connection) });
        // One that cannot be started is given nothing that it would drop here.
        let (give, given) = channel::<Arc<Connection>>();
        let started = std::thread::Builder::new().name("tool".into()).spawn(move || {
            let Ok(connection) = given.recv() else { return };
            tool::serve(&connection, &*attach, ask_limit);
            connection.end();
        });
        match started {
            Ok(_) => {
                let _ = give.send(connection);
            }
            Err(error) => {
                connection.end();
                self.closer.close(connection);
                return Err(error);
            }
        }
        Ok(())
    }

    fn find_slot(&mut self, who: Credentials) -> Result<(), (Refusal, String)> {
        if !who.is_administrator() && !self.admits_all {
            return Err((Refusal::Denied, format!("user {} may not", who.uid)));
        }
        self.forget_ended();
        let taken = self.running.iter().map(|tool| &*tool.slot);
        connection_limit::find(taken, who.uid).map_err(|message| (Refusal::Limit, message))
    }

    fn forget_ended(&mut self) {
        self.running.retain(|tool| tool.connection.strong_count() > 0);
    }

    /// Ends all connections and their views. Waits until all threads have ended, at most for so
    /// long, and returns of how many tools some have not.
    fn end(&mut self, limit: Duration) -> usize {
        let deadline = Instant::now() + limit;
        let tools: Vec<_> =
            self.running.iter().filter_map(|tool| tool.connection.upgrade()).collect();
        tools.iter().for_each(|tool| tool.socket.shut_down());
        tools.iter().for_each(|tool| tool.end());
        close_aside(tools);
        loop {
            self.forget_ended();
            if self.running.is_empty() || Instant::now() >= deadline {
                return self.running.len();
            }
            std::thread::sleep(END_LOOK);
        }
    }
}
