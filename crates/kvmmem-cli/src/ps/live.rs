// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem ps --watch`: what starts and ends in a guest, in a table on a terminal
//! ([`super::screen`]), else a line for each.

use std::io::{self, IsTerminal};
use std::time::{Duration, Instant};

use anyhow::Result;
use kvmmem_linux::tasks::Task;
use kvmmem_linux::{Kernel, KernelError};
use serde::Serialize;

use super::changes::{Change, Snapshot};
use super::screen::Screen;
use super::task_line::{TaskLine, command};
use crate::escape::escape;
use crate::interrupt::Interrupt;
use crate::linux::{Damage, Listing};
use crate::output::Output;
use crate::table::or_unknown;

/// Looks in a row that may fail, as the guest changes its lists meanwhile.
const FAILURES: u32 = 10;

/// A change, as JSON.
#[derive(Serialize)]
struct ChangeLine<'a> {
    event: &'static str,
    /// Milliseconds since the first look.
    ms: u64,
    #[serde(flatten)]
    task: TaskLine<'a>,
}

/// How changes are shown.
enum Display<'a> {
    Screen(Screen),
    Lines(&'a mut Output),
}

/// Looks again and again, `count` times or until interrupted. Returns what could not be read at the
/// last look, as [`super`] reports it of its only one.
pub(super) fn watch(
    kernel: &Kernel<'_>,
    has_thread: bool,
    (interval, count): (Duration, Option<u64>),
    look: impl Fn() -> Result<(Listing<Task>, Damage), KernelError>,
    output: &mut Output,
) -> Result<Damage> {
    let interrupt = Interrupt::catch()?;
    let start = Instant::now();
    let (tasks, damage) = look()?;
    if !damage.is_empty() {
        tracing::warn!("some of the list cannot be read: what starts and ends may be missed");
    }
    let mut last = Ok(damage);
    let mut seen = Snapshot::new(tasks.rows);
    // Keys are read from the one, and the table is shown by the other.
    let has_screen = !output.is_json() && io::stdout().is_terminal() && io::stdin().is_terminal();
    let mut shown = if has_screen {
        Display::Screen(Screen::open(has_thread)?)
    } else {
        Display::Lines(output)
    };
    let (mut looks, mut failures) = (1, 0);
    let mut changes = Vec::new();
    loop {
        let goes_on = match &mut shown {
            Display::Screen(screen) => {
                screen.add(std::mem::take(&mut changes));
                let wants_more = count.is_none_or(|count| looks < count);
                screen.show(seen.tasks(), wants_more.then_some(interval), &interrupt)?
            }
            Display::Lines(output) => {
                print(std::mem::take(&mut changes), start.elapsed(), has_thread, output)?;
                count.is_none_or(|count| looks < count) && !interrupt.wait(interval)?
            }
        };
        if !goes_on {
            return Ok(last?);
        }
        looks += 1;
        kernel.space().forget();
        last = match look() {
            Ok((tasks, damage)) => {
                failures = 0;
                changes = seen.look(tasks.rows, tasks.lost == 0);
                Ok(damage)
            }
            Err(error) if error.is_final() || failures >= FAILURES => return Err(error.into()),
            Err(error) => {
                failures += 1;
                Err(error)
            }
        };
    }
}

/// Prints a line for each change.
fn print(
    changes: Vec<(Change, Task)>,
    elapsed: Duration,
    has_thread: bool,
    output: &mut Output,
) -> Result<()> {
    for (change, task) in &changes {
        if output.is_json() {
            let ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
            output.object(&ChangeLine {
                event: name(*change),
                ms,
                task: TaskLine::new(task, has_thread),
            })?;
        } else {
            output.line(line(elapsed, *change, task))?;
        }
    }
    Ok(())
}

fn name(change: Change) -> &'static str {
    match change {
        Change::Started => "started",
        Change::Ended => "ended",
    }
}

fn line(elapsed: Duration, change: Change, task: &Task) -> String {
    let (seconds, name) = (elapsed.as_secs_f64(), name(change));
    format!(
        "{seconds:10.3}  {name:7}  {:<7}  {:<7}  {:<5}  {}",
        task.tid,
        or_unknown(task.ppid),
        or_unknown(task.euid),
        escape(&command(task))
    )
}
