// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The daemon: settings, log, signals, and a server.

use std::os::fd::AsFd;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::net::UnixStream;
use std::process::ExitCode;

use anyhow::{Context, bail};
use kvmmem_proto::credentials::group_id;
use kvmmem_proto::listener::ListenError;
use kvmmem_sys::activation;
use rustix::fs::Mode;
use rustix::process::{Resource, Rlimit};
use signal_hook::consts::{SIGINT, SIGTERM};
use tracing_subscriber::filter::EnvFilter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;

use crate::options::{Options, Settings};
use crate::server::{Server, ServerError};

/// The exit status where another instance has the socket.
const EXIT_IN_USE: u8 = 3;

/// Runs the daemon until it gets a signal.
pub fn run_daemon(options: Options) -> ExitCode {
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("kvmmemd: {error:#}");
            match error.downcast_ref::<ServerError>() {
                Some(ServerError::Listen(ListenError::InUse(_))) => ExitCode::from(EXIT_IN_USE),
                _ => ExitCode::FAILURE,
            }
        }
    }
}

fn run(options: Options) -> anyhow::Result<()> {
    let rust_log = std::env::var("RUST_LOG").ok().filter(|filter| !filter.is_empty());
    let settings = options.settings(rust_log)?;
    start_log(&settings)?;
    raise_fd_limit();
    // Before the socket appears: the parent may send the signal as soon as it does.
    let stop = stop_on_signal()?;
    let server = listen(&settings)?;
    let service = server.service();
    let broker = service.broker();
    broker.set_kvmi_tokens(settings.kvmi_tokens.into());
    service.set_guest_port(Some(settings.guest_port));
    if let Some(path) = &settings.audit {
        let opened = broker.write_audit_to(path);
        opened.with_context(|| format!("cannot open the audit log {}", path.display()))?;
    }
    if let Some(path) = &settings.state {
        let remembered = service.remember_in(path);
        remembered.with_context(|| format!("cannot remember VMs in {}", path.display()))?;
    }
    tracing::info!(socket = %server.path().display(), version = env!("CARGO_PKG_VERSION"), "listening");
    server.run(stop.as_fd())?;
    tracing::info!("stopped");
    Ok(())
}

/// The broker on the socket that the service manager has passed, else on one of its own.
fn listen(settings: &Settings) -> anyhow::Result<Server> {
    let mut passed = activation::passed_listeners()?;
    match (passed.pop(), passed.is_empty()) {
        (Some(listener), true) => return Ok(Server::from_activation(listener)?),
        (Some(_), false) => bail!("{} sockets were passed, not one", passed.len() + 1),
        (None, _) => {}
    }
    if let Some(directory) = settings.socket.parent() {
        // The directory itself may be passed through: the socket's mode says who may connect.
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o755).create(directory);
        made.with_context(|| format!("cannot make {}", directory.display()))?;
    }
    // All other files are private to the user, the socket too unless a group is given.
    rustix::process::umask(Mode::from_raw_mode(0o077));
    let group = settings.group.as_deref().map(group_id).transpose();
    let group = group.context("cannot find the group of the socket")?;
    Ok(Server::bind(&settings.socket, group)?)
}

/// Log to standard error.
fn start_log(settings: &Settings) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&settings.log)
        .with_context(|| format!("what to log is not a filter: {:?}", settings.log))?;
    let stderr = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let stderr =
        if settings.json { stderr.json().boxed() } else { stderr.with_ansi(false).boxed() };
    tracing_subscriber::registry().with(stderr.with_filter(filter)).init();
    Ok(())
}

/// A stream that becomes readable on SIGTERM and SIGINT.
fn stop_on_signal() -> anyhow::Result<UnixStream> {
    let (stop, signalled) = UnixStream::pair().context("cannot make a pair of sockets")?;
    for signal in [SIGTERM, SIGINT] {
        let signalled = signalled.try_clone().context("cannot duplicate a socket")?;
        signal_hook::low_level::pipe::register(signal, signalled)
            .context("cannot handle signals")?;
    }
    Ok(stop)
}

/// Each VM takes two file descriptors and each tool two more: the usual soft limit of 1024 is too
/// low.
fn raise_fd_limit() {
    let Rlimit { maximum, .. } = rustix::process::getrlimit(Resource::Nofile);
    let raised = Rlimit { current: maximum, maximum };
    if let Err(error) = rustix::process::setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}
