// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Asking the broker, `kvmmemd`: `targets`, `hook`, `unhook`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use kvmmem_client::admin::{Admin, TargetInfo};
use kvmmem_proto::endpoint::Endpoint;
use serde::Serialize;

use crate::failure::escape;
use crate::output::{Output, columns};
use crate::target;

/// Environment variable with the path of the broker's socket.
const SOCKET_VARIABLE: &str = "KVMMEM_BROKER";

/// Where kvmmemd listens unless it is told otherwise.
const DEFAULT_SOCKET: &str = "/run/kvmmem/kvmmemd.sock";

/// What to look at where the broker cannot be reached.
pub(crate) const NO_BROKER: &str = "no broker: is kvmmemd running, and may this user open its socket (root, or the socket's group)?";

#[derive(Args, Default)]
pub(crate) struct Broker {
    /// Socket of the broker [default: KVMMEM_BROKER, or else /run/kvmmem/kvmmemd.sock]
    #[arg(long = "broker", value_name = "PATH")]
    socket: Option<PathBuf>,
}

#[derive(Args)]
pub(crate) struct Targets {
    /// List those that run on this host instead, under whatever VMM, and which of them can be
    /// added
    #[arg(long)]
    discover: bool,
    #[command(flatten)]
    broker: Broker,
}

#[derive(Args)]
pub(crate) struct Hook {
    /// Name or UUID of the target
    target: String,
    /// Where the tool listens: vsock:CID:PORT in a virtual machine, or unix:PATH on this host
    endpoint: Endpoint,
    #[command(flatten)]
    broker: Broker,
}

/// What was done, as JSON.
#[derive(Serialize)]
struct Hooked<'a> {
    target: &'a str,
    endpoint: &'a Endpoint,
    hooked: bool,
}

impl Broker {
    /// Connects to the broker.
    pub(crate) fn connect(&self) -> Result<Admin> {
        Admin::connect(&self.socket.clone().unwrap_or_else(default_socket)).context(NO_BROKER)
    }
}

/// The broker's socket, where no option says which.
pub(crate) fn default_socket() -> PathBuf {
    std::env::var_os(SOCKET_VARIABLE).map_or_else(|| DEFAULT_SOCKET.into(), PathBuf::from)
}

impl Targets {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        if self.discover {
            target::list_found(&self.broker, output)?;
            return Ok(ExitCode::SUCCESS);
        }
        let targets =
            self.broker.connect()?.targets().context("cannot list the virtual machines")?;
        if output.is_json() {
            for target in &targets {
                output.object(target)?;
            }
        } else if targets.is_empty() {
            output.line("no virtual machine is registered")?;
        } else {
            for line in table(&targets) {
                output.line(line)?;
            }
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Hook {
    pub(crate) fn hook(&self, output: &mut Output) -> Result<ExitCode> {
        self.broker
            .connect()?
            .hook(&self.target, &self.endpoint)
            .with_context(|| format!("cannot hook {:?} to {}", self.target, self.endpoint))?;
        self.done(true, output)
    }

    pub(crate) fn unhook(&self, output: &mut Output) -> Result<ExitCode> {
        self.broker
            .connect()?
            .unhook(&self.target, &self.endpoint)
            .with_context(|| format!("cannot unhook {:?} from {}", self.target, self.endpoint))?;
        self.done(false, output)
    }

    fn done(&self, hooked: bool, output: &mut Output) -> Result<ExitCode> {
        if output.is_json() {
            output.object(&Hooked { target: &self.target, endpoint: &self.endpoint, hooked })?;
        } else {
            let verb = if hooked { "hooked to" } else { "unhooked from" };
            output.line(format!("{} is {verb} {}", escape(&self.target), self.endpoint))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The virtual machines as aligned columns, each hook on a line of its own below.
fn table(targets: &[TargetInfo]) -> Vec<String> {
    let header = ["NAME", "UUID", "VCPUS", "MEMORY", "CID", "PID", "ROLE"].map(str::to_owned);
    let rows: Vec<[String; 7]> = std::iter::once(header).chain(targets.iter().map(row)).collect();
    let hooks = std::iter::once(&[][..]).chain(targets.iter().map(|target| &target.hooks[..]));
    let mut lines = Vec::new();
    for (line, hooks) in columns(&rows).into_iter().zip(hooks) {
        lines.push(line);
        for hook in hooks {
            let state = if hook.connected { "connected" } else { "waiting for the tool" };
            lines.push(format!("  -> {}  {state}", hook.endpoint));
        }
    }
    lines
}

fn row(target: &TargetInfo) -> [String; 7] {
    let role = match (target.introspectable, target.introspector) {
        (true, true) => "target, introspector",
        (true, false) => "target",
        (false, true) => "introspector",
        (false, false) => "-",
    };
    [
        escape(&target.name),
        target.uuid.to_string(),
        target.vcpus.to_string(),
        match target.memory_bytes {
            0 => "-".to_owned(),
            bytes => format!("{} MiB", bytes >> 20),
        },
        target.cid.map_or_else(|| "-".to_owned(), |cid| cid.to_string()),
        target.pid.to_string(),
        role.to_owned(),
    ]
}

#[cfg(test)]
mod tests {
    use kvmmem_client::admin::HookInfo;
    use uuid::Uuid;

    use super::*;

    #[test]
    fn the_table_is_aligned_and_cannot_drive_the_terminal() {
        let target = |name: &str, hooks| TargetInfo {
            id: 1,
            name: name.to_owned(),
            uuid: Uuid::nil(),
            vcpus: 2,
            start_time_ms: 0,
            cid: Some(3),
            introspectable: true,
            introspector: false,
            memory_bytes: 256 << 20,
            pid: 77,
            hooks,
        };
        let hook = HookInfo { endpoint: "vsock:4:5000".parse().unwrap(), connected: true };
        let lines = table(&[target("a\x1b[2Jb", vec![hook]), target("x", Vec::new())]);
        assert_eq!(
            lines,
            [
                "NAME         UUID                                  VCPUS  MEMORY   CID  PID  ROLE",
                "a\\u{1b}[2Jb  00000000-0000-0000-0000-000000000000  2      256 MiB  3    77   target",
                "  -> vsock:4:5000  connected",
                "x            00000000-0000-0000-0000-000000000000  2      256 MiB  3    77   target",
            ]
        );
    }
}
