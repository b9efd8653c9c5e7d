// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Targets and the tools that listen for them: `hook add`, `hook remove`, `hook list`.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use kvmmem_client::admin::TargetInfo;
use kvmmem_proto::endpoint::Endpoint;
use serde::Serialize;

use crate::broker::Broker;
use crate::escape::escape;
use crate::output::{Output, columns};

#[derive(Args)]
pub(crate) struct Hook {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Connect a target to a tool that listens for it, now and whenever the connection ends.
    Add(Pair),
    /// Remove a hook and end its connection.
    Remove(Pair),
    /// List the hooks.
    List {
        #[command(flatten)]
        broker: Broker,
    },
}

#[derive(Args)]
struct Pair {
    /// Name or UUID of the target
    target: String,
    /// Where the tool listens: vsock:CID:PORT in a virtual machine, or unix:PATH on this host
    endpoint: Endpoint,
    #[command(flatten)]
    broker: Broker,
}

/// What was added or removed, as JSON.
#[derive(Serialize)]
struct PairLine<'a> {
    target: &'a str,
    endpoint: &'a Endpoint,
    hooked: bool,
}

/// A hook, as JSON.
#[derive(Serialize)]
struct HookLine<'a> {
    target: &'a str,
    endpoint: &'a Endpoint,
    connected: bool,
}

impl Hook {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        match &self.verb {
            Verb::Add(pair) => pair.add(output)?,
            Verb::Remove(pair) => pair.remove(output)?,
            Verb::List { broker } => list(broker, output)?,
        }
        Ok(ExitCode::SUCCESS)
    }
}

impl Pair {
    fn add(&self, output: &mut Output) -> Result<()> {
        self.broker
            .connect()?
            .hook(&self.target, &self.endpoint)
            .with_context(|| format!("cannot hook {:?} to {}", self.target, self.endpoint))?;
        self.done(true, output)
    }

    fn remove(&self, output: &mut Output) -> Result<()> {
        self.broker
            .connect()?
            .unhook(&self.target, &self.endpoint)
            .with_context(|| format!("cannot unhook {:?} from {}", self.target, self.endpoint))?;
        self.done(false, output)
    }

    fn done(&self, hooked: bool, output: &mut Output) -> Result<()> {
        if output.is_json() {
            output.object(&PairLine { target: &self.target, endpoint: &self.endpoint, hooked })?;
        } else {
            let verb = if hooked { "hooked to" } else { "unhooked from" };
            output.line(format!("{} is {verb} {}", escape(&self.target), self.endpoint))?;
        }
        Ok(())
    }
}

fn list(broker: &Broker, output: &mut Output) -> Result<()> {
    let targets = broker.connect()?.targets().context("cannot list the hooks")?;
    if output.is_json() {
        for target in &targets {
            for hook in &target.hooks {
                let (endpoint, connected) = (&hook.endpoint, hook.connected);
                output.object(&HookLine { target: &target.identity.name, endpoint, connected })?;
            }
        }
    } else if targets.iter().all(|target| target.hooks.is_empty()) {
        output.line("there are no hooks")?;
    } else {
        lines(&targets).into_iter().try_for_each(|line| output.line(line))?;
    }
    Ok(())
}

/// The hooks as aligned columns.
fn lines(targets: &[TargetInfo]) -> Vec<String> {
    let header = ["TARGET", "ENDPOINT", "STATE"].map(str::to_owned);
    let row = |target: &TargetInfo, endpoint: &Endpoint, connected| {
        let state = if connected { "connected" } else { "waiting for the tool" };
        [escape(&target.identity.name), endpoint.to_string(), state.to_owned()]
    };
    let rows = targets.iter().flat_map(|target| {
        target.hooks.iter().map(move |hook| row(target, &hook.endpoint, hook.connected))
    });
    columns(&std::iter::once(header).chain(rows).collect::<Vec<_>>())
}

#[cfg(test)]
mod tests {
    use kvmmem_client::admin::HookInfo;

    use super::*;
    use crate::registered::example;

    #[test]
    fn the_table_is_aligned_and_cannot_drive_the_terminal() {
        let hook =
            |endpoint: &str, connected| HookInfo { endpoint: endpoint.parse().unwrap(), connected };
        let hooks = vec![hook("vsock:4:5000", true), hook("unix:/run/t", false)];
        let targets = [TargetInfo { hooks, ..example("a\x1b[2Jb") }, example("x")];
        assert_eq!(
            lines(&targets),
            [
                "TARGET       ENDPOINT      STATE",
                "a\\u{1b}[2Jb  vsock:4:5000  connected",
                "a\\u{1b}[2Jb  unix:/run/t   waiting for the tool",
            ]
        );
    }
}
