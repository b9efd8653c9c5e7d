// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Standard output: text, in colour on a terminal alone, or one JSON object a line.
//!
//! Guests, VMMs and other peers name much of what is printed. No character of theirs reaches a
//! terminal that does more than to show it: [`Output::line`] and [`columns`] escape text, [`json`]
//! escapes it with its value kept.

use std::io::{self, IsTerminal, Write};

use anstream::AutoStream;
use rustix::termios::tcgetwinsize;
use serde::Serialize;
use unicode_width::{UnicodeWidthChar, UnicodeWidthStr};

use crate::escape::{escape, json};
use crate::failure::output_error;

/// Where results go.
pub(crate) struct Output {
    stream: Stream,
    json: bool,
}

enum Stream {
    Stdout(AutoStream<io::Stdout>),
    Stderr(AutoStream<io::Stderr>),
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Stdout(stream) => stream.write(bytes),
            Self::Stderr(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        match self {
            Self::Stdout(stream) => stream.flush(),
            Self::Stderr(stream) => stream.flush(),
        }
    }
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { stream: Stream::Stdout(anstream::stdout()), json }
    }

    /// Prints to standard error from now on: standard output has something else.
    pub(crate) fn use_stderr(&mut self) {
        self.stream = Stream::Stderr(anstream::stderr());
    }

    /// Whether the caller wants JSON.
    pub(crate) fn is_json(&self) -> bool {
        self.json
    }

    /// Writes a line of text, escaped, and flushes, so that a pipe's reader sees it at once.
    pub(crate) fn line(&mut self, text: impl AsRef<str>) -> io::Result<()> {
        self.styled(escape(text.as_ref()))
    }

    /// Writes text that has styles or line breaks of this program's. What a peer has named in it
    /// must be escaped.
    pub(crate) fn styled(&mut self, text: impl AsRef<str>) -> io::Result<()> {
        writeln!(self.stream, "{}", text.as_ref())
            .and_then(|()| self.stream.flush())
            .map_err(output_error)
    }

    /// Writes an object as a line of JSON.
    pub(crate) fn object(&mut self, object: &impl Serialize) -> io::Result<()> {
        self.styled(json(object)?)
    }

    /// Columns of the terminal that shows the output; `None` where no terminal does.
    pub(crate) fn width(&self) -> Option<usize> {
        let stdout = io::stdout();
        let is_shown = matches!(self.stream, Stream::Stdout(_)) && stdout.is_terminal();
        let size = tcgetwinsize(&stdout).ok().filter(|_| is_shown)?;
        // A terminal without a size, as of a serial line, reports 0.
        Some(usize::from(size.ws_col)).filter(|width| *width > 0)
    }

    /// Writes bytes as they are.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes).and_then(|()| stdout.flush()).map_err(output_error)
    }
}

/// The part of a line that fits in `width` columns, with `…` in place of what does not.
pub(crate) fn cut(line: &str, width: usize) -> String {
    if line.width() <= width {
        return line.to_owned();
    }
    let mut left = width.saturating_sub(1);
    let fits = |c: &char| {
        let fits = left.checked_sub(c.width().unwrap_or(0));
        left = fits.unwrap_or(0);
        fits.is_some()
    };
    line.chars().take_while(fits).collect::<String>() + "…"
}

/// The rows, escaped, as lines whose cells begin below each other, in the columns that a terminal
/// has for them.
pub(crate) fn columns(rows: &[impl AsRef<[String]>]) -> Vec<String> {
    let rows = rows.iter().map(|row| row.as_ref().iter().map(|cell| escape(cell)).collect());
    let rows: Vec<Vec<String>> = rows.collect();
    let mut widths = Vec::new();
    for row in &rows {
        widths.resize(row.len().max(widths.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.width().max(*width);
        }
    }
    let line = |row: &_| {
        let padded = |(cell, width): (&String, &usize)| {
            cell.to_owned() + &" ".repeat(width.saturating_sub(cell.width()))
        };
        let cells: Vec<String> =
            AsRef::<[String]>::as_ref(row).iter().zip(&widths).map(padded).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_characters_take_two_columns_and_combining_ones_none() {
        let rows =
            [["虚拟", "1"], ["e\u{301}", "2"], ["abcd", "3"]].map(|row| row.map(str::to_owned));
        assert_eq!(columns(&rows), ["虚拟  1", "e\u{301}     2", "abcd  3"]);
    }

    #[test]
    fn cells_cannot_drive_the_terminal_and_are_aligned_as_they_are_shown() {
        let lines =
            columns(&[["\u{9b}2J".to_owned(), "1".to_owned()], ["abc".to_owned(), "2".to_owned()]]);
        assert_eq!(lines, ["\\u{9b}2J  1", "abc       2"]);
    }

    #[test]
    fn a_line_is_cut_where_the_terminal_ends() {
        for (line, width, shown) in [
            ("abcd", 4, "abcd"),
            ("abcde", 4, "abc…"),
            ("虚拟机", 6, "虚拟机"),
            ("虚拟机", 5, "虚拟…"),
            ("虚拟机", 4, "虚…"),
            ("e\u{301}e\u{301}e", 2, "e\u{301}…"),
            ("abc", 1, "…"),
            ("", 1, ""),
        ] {
            assert_eq!(cut(line, width), shown, "{line} {width}");
            assert!(cut(line, width).width() <= width);
        }
    }
}
