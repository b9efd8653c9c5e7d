// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What the tokens allow that tools get over KVMI: `policy show`, `policy set`.

use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Args, Subcommand, ValueEnum};
use kvmmem_client::admin::KvmiPolicy;
use serde::Serialize;

use crate::broker::Broker;
use crate::escape::escape;
use crate::output::Output;

#[derive(Args)]
#[command(after_help = HELP)]
pub(crate) struct Policy {
    #[command(subcommand)]
    verb: Verb,
}

const HELP: &str = "\
Tools that are hooked to a target get tokens over KVMI; the policy says what these allow from now on.";

#[derive(Subcommand)]
enum Verb {
    /// Show the policy.
    Show(Show),
    /// Set the policy.
    Set(Set),
}

#[derive(Args)]
struct Show {
    /// Name or UUID of the target
    target: String,
    #[command(flatten)]
    broker: Broker,
}

#[derive(Args)]
struct Set {
    /// Name or UUID of the target
    target: String,
    /// What tokens allow from now on
    #[arg(value_enum)]
    policy: PolicyArgument,
    #[command(flatten)]
    broker: Broker,
}

/// What KVMI's tokens allow, on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum PolicyArgument {
    /// Reading and writing
    Rw,
    /// Reading; pages cannot be mapped one by one then, which always allows writing
    Ro,
    /// Nothing: no token is given
    None,
}

impl From<PolicyArgument> for KvmiPolicy {
    fn from(allowed: PolicyArgument) -> Self {
        match allowed {
            PolicyArgument::Rw => Self::ReadWrite,
            PolicyArgument::Ro => Self::ReadOnly,
            PolicyArgument::None => Self::None,
        }
    }
}

/// A target's policy, as JSON.
#[derive(Serialize)]
struct TargetPolicy<'a> {
    target: &'a str,
    policy: KvmiPolicy,
}

impl Policy {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let (Verb::Show(Show { target, broker }) | Verb::Set(Set { target, broker, .. })) =
            &self.verb;
        let set = match &self.verb {
            Verb::Show(_) => None,
            Verb::Set(set) => Some(set.policy.into()),
        };
        let doing = if set.is_some() { "set" } else { "show" };
        let policy = broker
            .connect()?
            .policy(target, set)
            .with_context(|| format!("cannot {doing} the policy of {target:?}"))?;
        if output.is_json() {
            output.object(&TargetPolicy { target, policy })?;
        } else {
            output.line(format!("{}: KVMI's tokens allow {policy}", escape(target)))?;
        }
        Ok(ExitCode::SUCCESS)
    }
}
