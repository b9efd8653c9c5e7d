// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Standard output: text, in colour on a terminal alone, or one JSON object a line.

use std::io::{self, Write};

use anstream::AutoStream;
use serde::Serialize;
use unicode_width::UnicodeWidthStr;

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

    /// Writes a line of text and flushes, so that a reader behind a pipe sees it at once.
    pub(crate) fn line(&mut self, text: impl AsRef<str>) -> io::Result<()> {
        writeln!(self.stream, "{}", text.as_ref())?;
        self.stream.flush()
    }

    /// Writes an object as a line of JSON.
    pub(crate) fn object(&mut self, object: &impl Serialize) -> io::Result<()> {
        let text = serde_json::to_string(object)?;
        self.line(text)
    }

    /// Writes bytes as they are.
    pub(crate) fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut stdout = io::stdout().lock();
        stdout.write_all(bytes)?;
        stdout.flush()
    }
}

/// The rows as lines whose cells begin below each other, in the columns that a terminal has for them.
pub(crate) fn columns(rows: &[impl AsRef<[String]>]) -> Vec<String> {
    let mut widths = Vec::new();
    for row in rows {
        let row = row.as_ref();
        widths.resize(row.len().max(widths.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.width().max(*width);
        }
    }
    let line = |row: &_| {
        let padded = |(cell, width): (&String, &usize)| {
            cell.to_owned() + &" ".repeat(width.saturating_sub(cell.width()))
        };
        let cells: Vec<String> = AsRef::<[String]>::as_ref(row).iter().zip(&widths).map(padded).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wide_characters_take_two_columns_and_combining_ones_none() {
        let rows = [["虚拟", "1"], ["e\u{301}", "2"], ["abcd", "3"]].map(|row| row.map(str::to_owned));
        assert_eq!(columns(&rows), ["虚拟  1", "e\u{301}     2", "abcd  3"]);
    }
}
