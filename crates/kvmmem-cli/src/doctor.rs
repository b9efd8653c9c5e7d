// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem doctor`: what this machine can be used for, and what to do where it cannot.

mod check;
mod guest;
mod host;
mod limits;
mod uses;
mod views;
mod without_module;

use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use clap::builder::styling::{AnsiColor, Style};
use serde::Serialize;

use crate::escape::escape;
use crate::failure::usage;
use crate::output::Output;
use check::{Check, Role, Status};
use uses::{Use, Verdict, verdicts};

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// What to look at: a KVM host, an introspector's guest, or whichever this machine is
    #[arg(long, value_enum, default_value_t = Role::Auto)]
    role: Role,
    /// The use that the exit code is about [default: any]
    #[arg(long = "for", value_name = "USE", value_enum)]
    wanted: Option<Use>,
}

const AFTER_HELP: &str = "\
Each check has a line, with what to do where something is missing; after them each use of the machine has one.

Exit codes:
  0  the machine can be used, in one way or, with --for, in that way
  1  it cannot; or failed, standard error says why
  2  the command line is wrong";

#[derive(Serialize)]
struct Diagnosis {
    role: Role,
    usable: bool,
    uses: Vec<Verdict>,
    checks: Vec<Check>,
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let role = match (self.role, self.wanted) {
            (Role::Auto, Some(wanted)) => wanted.role(),
            (Role::Auto, None) if guest::is_introspector() => Role::Guest,
            (Role::Auto, None) => Role::Host,
            (role, Some(wanted)) if role != wanted.role() => {
                return Err(usage("the use of --for is one of the other role: leave --role out"));
            }
            (role, _) => role,
        };
        let checks = if role == Role::Guest { guest::checks() } else { host::checks() };
        let uses = verdicts(role, &checks, rustix::process::geteuid().is_root());
        let is_wanted =
            |verdict: &&Verdict| self.wanted.is_none_or(|wanted| wanted == verdict.what);
        let usable = uses.iter().filter(is_wanted).any(|verdict| verdict.status != Status::Fail);
        let diagnosis = Diagnosis { role, usable, uses, checks };
        if output.is_json() {
            output.object(&diagnosis)?;
        } else {
            print(&diagnosis, output)?;
        }
        Ok(if usable { ExitCode::SUCCESS } else { ExitCode::FAILURE })
    }
}

fn print(diagnosis: &Diagnosis, output: &mut Output) -> Result<()> {
    let width = diagnosis.checks.iter().map(|check| check.name.len()).max().unwrap_or(0);
    for Check { name, status, detail, remedy } in &diagnosis.checks {
        let (style, word) = shown(*status);
        output.styled(format!("{style}{word}{style:#}  {name:width$}  {}", escape(detail)))?;
        if let Some(remedy) = remedy {
            let indent = " ".repeat(width + 8);
            output.styled(format!("{indent}-> {}", escape(remedy)))?;
        }
    }
    let bold = Style::new().bold();
    output.styled(format!(
        "{bold}this {}{bold:#}",
        if diagnosis.role == Role::Guest { "guest" } else { "host" }
    ))?;
    for Verdict { what, status, see } in &diagnosis.uses {
        let (style, word) = shown(*status);
        let verb = if *status == Status::Fail { "cannot" } else { "can" };
        let see = if see.is_empty() { String::new() } else { format!(": see {}", see.join(", ")) };
        output.styled(format!("{style}{word}{style:#}  {verb} {}{see}", what.text()))?;
    }
    Ok(())
}

/// Style and word of a status.
fn shown(status: Status) -> (Style, &'static str) {
    match status {
        Status::Ok => (AnsiColor::Green.on_default(), "ok  "),
        Status::Warn => (AnsiColor::Yellow.on_default(), "warn"),
        Status::Fail => (AnsiColor::Red.on_default().bold(), "fail"),
    }
}
