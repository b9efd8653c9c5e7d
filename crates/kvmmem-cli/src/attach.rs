// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem attach`: a view and what happens to it.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use kvmmem::view::{Access, Event, State, Status, View};
use serde::Serialize;
use uuid::Uuid;

use crate::interrupt::Interrupt;
use crate::number::{Hex, size};
use crate::output::Output;
use crate::range::RangeLine;
use crate::source::Source;

/// Exit code where the grant was revoked.
const REVOKED: u8 = 3;

/// Exit code where the target went away.
const GONE: u8 = 4;

/// The longest wait between two looks for signals.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// Keep the view and print what happens to it, until interrupted or until it ends
    #[arg(long)]
    hold: bool,
    /// Ask for reading alone, even if the grant allows writing
    #[arg(long)]
    read_only: bool,
    #[command(flatten)]
    source: Source,
}

const AFTER_HELP: &str = "\
Exit codes:
  0  attached, and detached again; with --hold, when interrupted
  1  failed, standard error says why
  2  the command line is wrong
  3  the grant was revoked
  4  the target or the broker has exited";

/// What happens to the view, as JSON.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum EventLine {
    Attached(StatusLine),
    Changed(StatusLine),
    Revoked,
    Gone,
    Detached,
}

#[derive(Serialize)]
struct StatusLine {
    target: Uuid,
    state: &'static str,
    generation: u64,
    writable: bool,
    ranges: Vec<RangeLine>,
}

impl From<Status> for StatusLine {
    fn from(status: Status) -> Self {
        let ranges =
            status.ranges.iter().map(|range| RangeLine::new(range.gpa, range.len)).collect();
        let target = Uuid::from_bytes(status.uuid);
        let state = match status.state {
            State::Open => "open",
            State::Revoked => "revoked",
            State::Gone => "gone",
        };
        Self { target, state, generation: status.generation, writable: status.is_writable, ranges }
    }
}

impl Arguments {
    pub(crate) fn run(&self, output: &mut Output) -> Result<ExitCode> {
        let is_read_only = self.read_only || self.source.is_by_name();
        let access = if is_read_only { Access::ReadOnly } else { Access::Granted };
        let view = self.source.attach(access, "attach", &[])?;
        let interrupt = Interrupt::catch()?;
        tell(EventLine::Attached(view.status()?.into()), output)?;
        if self.hold {
            let end = hold(&view, &interrupt, output)?;
            if let Some(code) = end {
                return Ok(ExitCode::from(code));
            }
        }
        view.detach()?;
        tell(EventLine::Detached, output)?;
        Ok(ExitCode::SUCCESS)
    }
}

/// Prints events until a signal comes or the view ends. The end of the view gives the exit code.
fn hold(view: &View, interrupt: &Interrupt, output: &mut Output) -> Result<Option<u8>> {
    while !interrupt.has_come() {
        match view.wait(SIGNAL_INTERVAL)? {
            None => {}
            Some(Event::Changed) => tell(EventLine::Changed(view.status()?.into()), output)?,
            Some(Event::Revoked) => {
                tell(EventLine::Revoked, output)?;
                return Ok(Some(REVOKED));
            }
            Some(Event::Gone) => {
                tell(EventLine::Gone, output)?;
                return Ok(Some(GONE));
            }
        }
    }
    Ok(None)
}

fn tell(told: EventLine, output: &mut Output) -> Result<()> {
    if output.is_json() {
        return Ok(output.object(&told)?);
    }
    match told {
        EventLine::Attached(view) => tell_view("attached to", &view, output),
        EventLine::Changed(view) => tell_view("changed:", &view, output),
        EventLine::Revoked => Ok(output.line("revoked: the owner revoked the grant")?),
        EventLine::Gone => Ok(output.line("gone: the target or the broker has ended")?),
        EventLine::Detached => Ok(output.line("detached")?),
    }
}

fn tell_view(what: &str, view: &StatusLine, output: &mut Output) -> Result<()> {
    let StatusLine { target, state, generation, writable, ranges } = view;
    let rights = if *writable { "read-write" } else { "read-only" };
    output.line(format!("{what} {target}, {state}, {rights}, generation {generation}"))?;
    for RangeLine { gpa: Hex(gpa), len } in ranges {
        output.line(format!(
            "  {gpa:#014x}..{:#014x}  {}",
            gpa.saturating_add(*len),
            size(*len)
        ))?;
    }
    Ok(())
}
