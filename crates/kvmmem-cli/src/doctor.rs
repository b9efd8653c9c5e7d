// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem doctor`: whether this machine can run kvmmem, line by line, and what to do where not.

mod guest;
mod host;
mod limits;
mod views;

use std::process::ExitCode;

use anyhow::Result;
use clap::builder::styling::{AnsiColor, Style};
use clap::{Args, ValueEnum};
use serde::Serialize;

use crate::failure::escape;
use crate::output::Output;

#[derive(Args)]
pub(crate) struct Arguments {
    /// What to look at: a KVM host, an introspector's guest, or whichever this machine is
    #[arg(long, value_enum, default_value_t = Role::Auto)]
    role: Role,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, Serialize)]
#[serde(rename_all = "snake_case")]
enum Role {
    /// A guest where the host's signature is seen or the module is loaded, else a host
    Auto,
    /// A machine that runs virtual machines
    Host,
    /// A virtual machine that is to look at others
    Guest,
}

/// How a check came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
enum Status {
    Ok,
    Warn,
    Fail,
}

/// One line of the diagnosis.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    status: Status,
    /// What was found.
    detail: String,
    /// What to do about it; none where all is well.
    remedy: Option<String>,
}

#[derive(Serialize)]
struct Diagnosis {
    role: Role,
    usable: bool,
    checks: Vec<Check>,
}

impl Check {
    fn ok(name: &'static str, detail: impl Into<String>) -> Self {
        Self { name, status: Status::Ok, detail: detail.into(), remedy: None }
    }

    fn warn(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Warn, detail: detail.into(), remedy: Some(remedy.into()) }
    }

    fn fail(name: &'static str, detail: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { name, status: Status::Fail, detail: detail.into(), remedy: Some(remedy.into()) }
    }
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let role = match self.role {
            Role::Auto if guest::is_introspector() => Role::Guest,
            Role::Auto => Role::Host,
            role => role,
        };
        let checks = if role == Role::Guest { guest::checks() } else { host::checks() };
        let usable = checks.iter().all(|check| check.status != Status::Fail);
        let diagnosis = Diagnosis { role, usable, checks };
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
        let (style, word) = match status {
            Status::Ok => (AnsiColor::Green.on_default(), "ok  "),
            Status::Warn => (AnsiColor::Yellow.on_default(), "warn"),
            Status::Fail => (AnsiColor::Red.on_default().bold(), "fail"),
        };
        output.line(format!("{style}{word}{style:#}  {name:width$}  {}", escape(detail)))?;
        if let Some(remedy) = remedy {
            let indent = " ".repeat(width + 8);
            output.line(format!("{indent}-> {}", escape(remedy)))?;
        }
    }
    let bold = Style::new().bold();
    let verdict = match (diagnosis.role, diagnosis.usable) {
        (Role::Guest, true) => "this virtual machine can map others' memory",
        (Role::Guest, false) => "this virtual machine cannot map others' memory yet",
        (_, true) => "this host can run targets and introspectors",
        (_, false) => "this host cannot run targets and introspectors yet",
    };
    Ok(output.line(format!("{bold}{verdict}{bold:#}"))?)
}
