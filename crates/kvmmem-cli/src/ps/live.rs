// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem ps --watch`: what starts and ends in a guest, as a table that stays in place on a terminal, else a line for each.

use std::collections::VecDeque;
use std::fmt::Write;
use std::io::IsTerminal;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use kvmmem_linux::tasks::Task;
use kvmmem_linux::{Kernel, KernelError};
use rustix::termios::{Winsize, tcgetwinsize};
use serde::Serialize;

use super::changes::{Change, Seen};
use super::{TaskLine, command};
use crate::failure::escape;
use crate::interrupt::Interrupt;
use crate::output::{Output, cut};
use crate::table::or_unknown;

/// Looks in a row that may fail, as the guest changes its lists meanwhile.
const FAILURES: u32 = 10;

/// The longest wait between two looks for signals.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(100);

/// Changes that are kept for a table whose size may change.
const KEPT: usize = 1000;

/// A change, as JSON.
#[derive(Serialize)]
struct ChangeLine<'a> {
    event: &'static str,
    /// Milliseconds since the first look.
    ms: u64,
    #[serde(flatten)]
    task: TaskLine<'a>,
}

/// The changes so far, and how they are shown.
struct Live {
    start: Instant,
    is_table: bool,
    has_thread: bool,
    /// Lines of the last changes, the newest last.
    lines: VecDeque<String>,
    /// How many lines were drawn.
    drawn: usize,
}

/// Looks again and again, `count` times or until interrupted.
pub(super) fn watch(
    kernel: &Kernel<'_>,
    has_thread: bool,
    (interval, count): (Duration, Option<u64>),
    list: impl Fn() -> Result<Vec<Task>, KernelError>,
    output: &mut Output,
) -> Result<()> {
    let interrupt = Interrupt::catch()?;
    let is_table = !output.is_json() && std::io::stdout().is_terminal();
    let (start, lines) = (Instant::now(), VecDeque::new());
    let mut live = Live { start, is_table, has_thread, lines, drawn: 0 };
    let mut seen = Seen::new(list()?);
    live.show(&seen, &[], output)?;
    let (mut looks, mut failures) = (1, 0);
    while count.is_none_or(|count| looks < count) && sleep(interval, &interrupt) {
        looks += 1;
        kernel.space().forget();
        match list() {
            Ok(tasks) => {
                failures = 0;
                let changes = seen.look(tasks);
                live.show(&seen, &changes, output)?;
            }
            Err(error) if error.is_final() || failures >= FAILURES => return Err(error.into()),
            Err(_) => failures += 1,
        }
    }
    Ok(())
}

/// Waits for the next look; `false` if none is wanted.
fn sleep(interval: Duration, interrupt: &Interrupt) -> bool {
    let start = Instant::now();
    loop {
        if interrupt.has_come() {
            return false;
        }
        let left = interval.saturating_sub(start.elapsed());
        if left.is_zero() {
            return true;
        }
        thread::sleep(left.min(SIGNAL_INTERVAL));
    }
}

impl Live {
    fn show(&mut self, seen: &Seen, changes: &[(Change, Task)], output: &mut Output) -> Result<()> {
        let elapsed = self.start.elapsed();
        for (change, task) in changes {
            if output.is_json() {
                let ms = u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX);
                let task = TaskLine::new(task, self.has_thread);
                output.object(&ChangeLine { event: name(*change), ms, task })?;
            } else if self.is_table {
                self.lines.push_back(line(elapsed, *change, task));
            } else {
                output.line(line(elapsed, *change, task))?;
            }
        }
        self.lines.drain(..self.lines.len().saturating_sub(KEPT));
        if self.is_table {
            let size = tcgetwinsize(std::io::stdout()).ok();
            let picture = self.picture(seen.len(), size);
            output.raw(picture.as_bytes())?;
        }
        Ok(())
    }

    /// The table, over the one that was drawn before.
    fn picture(&mut self, count: usize, size: Option<Winsize>) -> String {
        let (rows, width) = size.map_or((24, 80), |size| (size.ws_row.max(3), size.ws_col.max(20)));
        let shown = self.lines.len().min(usize::from(rows) - 2);
        let mut picture = String::new();
        if self.drawn > 0 {
            // Up to the begin of what was drawn, and all of it away.
            let _ = write!(picture, "\x1b[{}A\x1b[J", self.drawn);
        }
        let title = format!("{count} tasks; what has started and ended:");
        let lines = self.lines.iter().skip(self.lines.len() - shown).map(String::as_str);
        for line in std::iter::once(title.as_str()).chain(lines) {
            picture.push_str(&cut(line, width.into()));
            picture.push('\n');
        }
        self.drawn = shown + 1;
        picture
    }
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

#[cfg(test)]
mod tests {
    use super::super::tree::tests::task;
    use super::*;

    #[test]
    fn the_table_has_the_last_changes_and_fits_the_terminal() {
        let mut live = Live {
            start: Instant::now(),
            is_table: true,
            has_thread: false,
            lines: VecDeque::new(),
            drawn: 0,
        };
        for pid in 1..10 {
            let task = Task { comm: "虚拟\x1b[2J".to_owned(), ..task(pid, 1) };
            live.lines.push_back(line(Duration::from_millis(1500), Change::Started, &task));
        }
        let size = Winsize { ws_row: 5, ws_col: 45, ws_xpixel: 0, ws_ypixel: 0 };
        let picture = live.picture(7, Some(size));
        let lines: Vec<&str> = picture.lines().collect();
        assert_eq!(lines[0], "7 tasks; what has started and ended:");
        assert_eq!(lines.len(), 4);
        assert_eq!(lines[3], "     1.500  started  9        1        0    …");
        let again = live.picture(7, Some(Winsize { ws_col: 80, ..size }));
        assert!(again.starts_with("\x1b[4A\x1b[J7 tasks"), "{again:?}");
        assert!(again.ends_with("虚拟\\u{1b}[2J\n"), "{again:?}");
    }
}
