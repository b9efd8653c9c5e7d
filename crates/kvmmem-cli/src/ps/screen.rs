// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table of `kvmmem ps --watch` on a terminal: what has started and ended lately, and below
//! that all other tasks.
//!
//! The terminal is in raw mode and shows its alternate screen as long as [`Screen`] lives. It is
//! restored when that is dropped, after errors and signals, and by ratatui's hook after a panic.

use std::collections::VecDeque;
use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use kvmmem_linux::tasks::Task;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::layout::Constraint;
use ratatui::style::{Color, Modifier, Style};
use ratatui::widgets::{Block, Row, Table};
use ratatui::{DefaultTerminal, Frame};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::changes::Change;
use super::task_line::command;
use crate::escape::escape;
use crate::interrupt::Interrupt;
use crate::table::{mark, or_unknown};

/// How long a change is shown, and how many are.
const RECENT: Duration = Duration::from_secs(10);
const MAX_RECENT: usize = 1000;

/// What a key asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wish {
    Quit,
    /// So many rows down.
    Scroll(isize),
    Top,
    Nothing,
}

/// The terminal, and what is shown on it.
pub(super) struct Screen {
    terminal: DefaultTerminal,
    list: List,
}

/// The rows.
#[derive(Debug)]
struct List {
    has_thread: bool,
    /// The newest first.
    recent: VecDeque<(Instant, Change, Task)>,
    /// Rows above the first that is shown.
    top: usize,
}

impl Screen {
    /// Takes the terminal.
    pub(super) fn open(has_thread: bool) -> Result<Self> {
        let terminal = ratatui::try_init()
            .inspect_err(|_| ratatui::restore())
            .context("cannot use the terminal")?;
        Ok(Self { terminal, list: List::new(has_thread) })
    }

    /// Adds changes.
    pub(super) fn add(&mut self, changes: Vec<(Change, Task)>) {
        self.list.add(changes, Instant::now());
    }

    /// Shows the tasks until the next look, which is after `interval`, or none is; `false` if the
    /// user wants no other.
    pub(super) fn show<'t>(
        &mut self,
        tasks: impl Iterator<Item = &'t Task>,
        interval: Option<Duration>,
        interrupt: &Interrupt,
    ) -> Result<bool> {
        let start = Instant::now();
        let mut tasks: Vec<&Task> = tasks.collect();
        tasks.sort_by_key(|task| (task.pid, task.tid != task.pid, task.tid));
        self.list.expire(start);
        loop {
            self.terminal
                .draw(|frame| self.list.draw(&tasks, frame))
                .context("cannot draw on the terminal")?;
            let Some(interval) = interval else { return Ok(false) };
            if !wait(interval.saturating_sub(start.elapsed()), interrupt)
                .context("cannot wait for keys")?
            {
                return Ok(false);
            }
            // Keys that came together are read together. A new size is an event as well.
            while event::poll(Duration::ZERO).context("cannot read keys")? {
                match wish(&event::read().context("cannot read keys")?) {
                    Wish::Quit => return Ok(false),
                    wish => self.list.scroll(wish, tasks.len()),
                }
            }
            if start.elapsed() >= interval {
                return Ok(true);
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        ratatui::restore();
    }
}

/// Waits for a key or another size of the terminal for at most `limit`; `false` if the terminal is
/// gone or an interrupt has come. crossterm never returns from waiting for the keys of a terminal
/// that is gone.
fn wait(limit: Duration, interrupt: &Interrupt) -> io::Result<bool> {
    let limit = Timespec::try_from(limit).map_err(|_| io::ErrorKind::InvalidInput)?;
    let stdin = io::stdin();
    let mut fds = [PollFd::new(&stdin, PollFlags::IN), PollFd::new(interrupt, PollFlags::IN)];
    match poll(&mut fds, Some(&limit)) {
        Ok(_) => {}
        // The signal of another size, or an interrupt.
        Err(Errno::INTR) => return Ok(!interrupt.has_come()),
        Err(error) => return Err(error.into()),
    }
    let [keys, interrupt] = fds.map(|fd| fd.revents());
    Ok(interrupt.is_empty() && !keys.intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL))
}

fn wish(event: &Event) -> Wish {
    const PAGE: isize = 10;
    let Event::Key(KeyEvent { code, modifiers, kind: KeyEventKind::Press, .. }) = event else {
        return Wish::Nothing;
    };
    match code {
        KeyCode::Char('c') if modifiers.contains(KeyModifiers::CONTROL) => Wish::Quit,
        KeyCode::Char('q') | KeyCode::Esc => Wish::Quit,
        KeyCode::Down | KeyCode::Char('j') => Wish::Scroll(1),
        KeyCode::Up | KeyCode::Char('k') => Wish::Scroll(-1),
        KeyCode::PageDown => Wish::Scroll(PAGE),
        KeyCode::PageUp => Wish::Scroll(-PAGE),
        KeyCode::Home => Wish::Top,
        _ => Wish::Nothing,
    }
}

impl List {
    fn new(has_thread: bool) -> Self {
        Self { has_thread, recent: VecDeque::new(), top: 0 }
    }

    fn add(&mut self, changes: Vec<(Change, Task)>, now: Instant) {
        for (change, task) in changes {
            self.recent.push_front((now, change, task));
        }
        self.recent.truncate(MAX_RECENT);
    }

    fn expire(&mut self, now: Instant) {
        self.recent.retain(|(since, ..)| now.saturating_duration_since(*since) < RECENT);
    }

    fn scroll(&mut self, wish: Wish, count: usize) {
        match wish {
            Wish::Scroll(rows) => {
                self.top = self.top.saturating_add_signed(rows).min(count.saturating_sub(1))
            }
            Wish::Top => self.top = 0,
            Wish::Quit | Wish::Nothing => {}
        }
    }

    fn draw(&self, tasks: &[&Task], frame: &mut Frame<'_>) {
        let count = |wanted| self.recent.iter().filter(|(_, change, _)| *change == wanted).count();
        let (started, ended) = (count(Change::Started), count(Change::Ended));
        let things = if self.has_thread { "threads" } else { "processes" };
        let title = format!(
            " {} {things}; in the last {} s {started} started, {ended} ended; q quits ",
            tasks.len(),
            RECENT.as_secs()
        );
        let is_recent = |task: &Task| {
            let same = |other: &Task| (other.tid, other.start) == (task.tid, task.start);
            self.recent.iter().any(|(_, change, other)| *change == Change::Started && same(other))
        };
        let recent = self.recent.iter().map(|(_, change, task)| (task, style(*change)));
        let others = tasks.iter().filter(|task| !is_recent(task)).map(|task| (*task, Style::new()));
        // At most those that fit.
        let rows = recent.chain(others).skip(self.top).take(frame.area().height.into());
        let rows = rows.map(|(task, style)| Row::new(self.cells(task)).style(style));
        let names = ["PID", "TID", "PPID", "UID", "STATE", "START", "COMMAND"];
        let names = names.into_iter().filter(|name| self.has_thread || *name != "TID");
        let header = Row::new(names).style(Style::new().add_modifier(Modifier::BOLD));
        let widths = [7, 7, 7, 7, 5, 11]
            .map(Constraint::Length)
            .into_iter()
            .skip(usize::from(!self.has_thread));
        let table = Table::new(rows, widths.chain([Constraint::Fill(1)]));
        frame.render_widget(table.header(header).block(Block::new().title(title)), frame.area());
    }

    /// The cells of a task, escaped: the guest has chosen its words.
    fn cells(&self, task: &Task) -> Vec<String> {
        let start = task
            .start
            .map(|start| format!("{}.{:02}", start.as_secs(), start.subsec_millis() / 10));
        let mut cells = vec![task.pid.to_string()];
        cells.extend(self.has_thread.then(|| task.tid.to_string()));
        cells.extend([
            or_unknown(task.ppid),
            or_unknown(task.euid),
            format!("{}{}", task.state, mark(task.is_torn, task.is_damaged)),
            or_unknown(start),
            escape(&command(task)),
        ]);
        cells
    }
}

fn style(change: Change) -> Style {
    match change {
        Change::Started => Style::new().fg(Color::Green),
        Change::Ended => Style::new().fg(Color::Red).add_modifier(Modifier::CROSSED_OUT),
    }
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::super::tree::tests::task;
    use super::*;

    fn lines(terminal: &Terminal<TestBackend>) -> Vec<String> {
        let buffer = terminal.backend().buffer();
        let cells: Vec<&str> = buffer.content().iter().map(|cell| cell.symbol()).collect();
        cells
            .chunks(buffer.area.width.into())
            .map(|line| line.concat().trim_end().to_owned())
            .collect()
    }

    #[test]
    fn changes_come_first_and_fit_a_terminal_of_any_size() {
        let named = |pid, name: &str| Task { comm: name.to_owned(), ..task(pid, 1) };
        let (old, new, gone) = (named(1, "init"), named(7, "new\x1b[2J\u{9b}m"), named(5, "gone"));
        let mut list = List::new(false);
        let now = Instant::now();
        list.add(vec![(Change::Ended, gone), (Change::Started, new.clone())], now);
        let mut terminal = Terminal::new(TestBackend::new(80, 6)).unwrap();
        terminal.draw(|frame| list.draw(&[&old, &new], frame)).unwrap();
        let shown = lines(&terminal);
        assert!(
            shown[0].contains("2 processes; in the last 10 s 1 started, 1 ended; q quits"),
            "{shown:#?}"
        );
        assert!(shown[1].starts_with("PID") && shown[1].ends_with("COMMAND"), "{shown:#?}");
        assert!(
            shown[2].starts_with("7 ") && shown[2].ends_with("new\\u{1b}[2J\\u{9b}m"),
            "{shown:#?}"
        );
        assert!(shown[3].starts_with("5 ") && shown[3].ends_with("gone"), "{shown:#?}");
        assert!(shown[4].starts_with("1 ") && shown[4].ends_with("init"), "{shown:#?}");
        let color = |row| terminal.backend().buffer()[(0, row)].fg;
        assert_eq!([2, 3, 4].map(color), [Color::Green, Color::Red, Color::Reset]);
        for (width, height) in [(1, 1), (20, 3), (200, 50)] {
            terminal.backend_mut().resize(width, height);
            terminal.draw(|frame| list.draw(&[&old, &new], frame)).unwrap();
            assert_eq!(lines(&terminal).len(), usize::from(height));
        }
        // After a while the one is as the others, and the other is not there.
        list.expire(now + RECENT);
        terminal.draw(|frame| list.draw(&[&old, &new], frame)).unwrap();
        let shown = lines(&terminal);
        assert!(
            shown[2].starts_with("1 ") && shown[3].starts_with("7 ") && shown[4].is_empty(),
            "{shown:#?}"
        );
        list.scroll(Wish::Scroll(1), 2);
        terminal.draw(|frame| list.draw(&[&old, &new], frame)).unwrap();
        assert!(lines(&terminal)[2].starts_with("7 "));
    }

    #[test]
    fn keys_quit_and_scroll() {
        let key = |code, modifiers| wish(&Event::Key(KeyEvent::new(code, modifiers)));
        assert_eq!(key(KeyCode::Char('q'), KeyModifiers::NONE), Wish::Quit);
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::CONTROL), Wish::Quit);
        assert_eq!(key(KeyCode::Char('c'), KeyModifiers::NONE), Wish::Nothing);
        assert_eq!(key(KeyCode::PageUp, KeyModifiers::NONE), Wish::Scroll(-10));
        assert_eq!(wish(&Event::Resize(3, 4)), Wish::Nothing);
        let mut list = List::new(true);
        list.scroll(Wish::Scroll(10), 5);
        assert_eq!(list.top, 4);
        list.scroll(Wish::Scroll(-10), 5);
        assert_eq!(list.top, 0);
    }
}
