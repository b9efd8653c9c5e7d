// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmemd`: the broker as a daemon.
//!
//! Exit status: 0 after SIGTERM or SIGINT; 1 where it cannot serve; 2 where the command line is wrong; 3 where another
//! instance has the socket.
#![deny(unsafe_code)]

use std::fs::OpenOptions;
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use clap::{Parser, ValueEnum};
use kvmmem_broker::admin::KvmiPolicy;
use kvmmem_broker::server::{Server, ServerError};
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use tracing_subscriber::filter::{EnvFilter, LevelFilter};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

/// The exit status where another instance has the socket.
const EXIT_IN_USE: u8 = 3;

/// The host's service for kvmmem: knows the VMs, speaks KVMI with introspection tools, gives out mapping tokens.
///
/// Exit status: 0 after SIGTERM or SIGINT; 1 if it cannot serve; 2 for a wrong command line; 3 if another instance
/// has the socket.
#[derive(Parser)]
#[command(version)]
struct Options {
    /// Where VMMs and the command line connect.
    #[arg(long, value_name = "PATH", default_value = "/run/kvmmem/kvmmemd.sock")]
    socket: PathBuf,

    /// Name or number of a group whose members may connect too (the socket's mode is then 0660, else 0600).
    #[arg(long, value_name = "GROUP")]
    group: Option<String>,

    /// Write the log to standard error as JSON, one object a line.
    #[arg(long)]
    json: bool,

    /// Append the audit log to this file as JSON, one object a line, besides the other log.
    #[arg(long, value_name = "PATH")]
    audit: Option<PathBuf>,

    /// What tokens allow that KVMI makes, for targets that have no policy of their own.
    #[arg(long, value_name = "RIGHTS", value_enum, default_value_t = KvmiTokens::Rw)]
    kvmi_tokens: KvmiTokens,
}

/// As [`KvmiPolicy`].
#[derive(Clone, Copy, ValueEnum)]
enum KvmiTokens {
    /// Reading and writing all RAM
    Rw,
    /// Reading all RAM
    Ro,
    /// Nothing: no token is made
    None,
}

impl From<KvmiTokens> for KvmiPolicy {
    fn from(tokens: KvmiTokens) -> Self {
        match tokens {
            KvmiTokens::Rw => Self::ReadWrite,
            KvmiTokens::Ro => Self::ReadOnly,
            KvmiTokens::None => Self::None,
        }
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    match run(&options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvmmemd: {error:#}");
            match error.downcast_ref::<ServerError>() {
                Some(ServerError::InUse(_)) => ExitCode::from(EXIT_IN_USE),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(options: &Options) -> anyhow::Result<()> {
    start_log(options);
    raise_fd_limit();
    if let Some(directory) = options.socket.parent() {
        // The directory itself may be passed through: the socket's mode says who may connect.
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory);
        made.with_context(|| format!("cannot make {}", directory.display()))?;
    }
    // Nothing else that is made here, the socket least of all, is for others unless it is said so.
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let group = options.group.as_deref().map(group_id).transpose()?;
    // Before the socket is there for all to see: whoever finds it may send the signal.
    let stop = stop_on_signal()?;
    let server = Server::bind(&options.socket, group)?;
    let broker = server.broker();
    broker.set_kvmi_tokens(options.kvmi_tokens.into());
    if let Some(path) = &options.audit {
        let file = OpenOptions::new().create(true).append(true).mode(0o600).open(path);
        broker
            .audit()
            .write_to(file.with_context(|| format!("cannot open the audit log {}", path.display()))?);
    }
    tracing::info!(socket = %options.socket.display(), version = env!("CARGO_PKG_VERSION"), "listening");
    server.run(stop.as_fd())?;
    tracing::info!("stopped");
    Ok(())
}

/// Log to standard error by `RUST_LOG` (default: info).
fn start_log(options: &Options) {
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env_lossy();
    let stderr = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let stderr = if options.json { stderr.json().boxed() } else { stderr.with_ansi(false).boxed() };
    tracing_subscriber::registry().with(stderr.with_filter(filter)).init();
}

/// A stream that becomes readable on SIGTERM and SIGINT.
fn stop_on_signal() -> anyhow::Result<UnixStream> {
    let (stop, signalled) = UnixStream::pair().context("cannot make a pair of sockets")?;
    for signal in [SIGTERM, SIGINT] {
        let signalled = signalled.try_clone().context("cannot duplicate a socket")?;
        signal_hook::low_level::pipe::register(signal, signalled).context("cannot handle signals")?;
    }
    Ok(stop)
}

/// Each VM takes two file descriptors and each tool two more: the usual soft limit of 1024 is too low.
fn raise_fd_limit() {
    let Rlimit { maximum, .. } = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: maximum, maximum };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// The number of a group, given by name or number.
fn group_id(group: &str) -> anyhow::Result<u32> {
    if let Ok(id) = group.parse() {
        return Ok(id);
    }
    let path = Path::new("/etc/group");
    let text = std::fs::read_to_string(path).context("cannot read /etc/group")?;
    let find = |line: &str| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (name == group).then(|| fields.nth(1)?.parse().ok()).flatten()
    };
    text.lines().find_map(find).with_context(|| format!("there is no group {group:?}"))
}
