// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Rows of the verbs about a guest: one JSON object each, or a table.

use std::io;

use clap::Args;
use serde::Serialize;

use crate::output::{Output, columns, cut};

#[derive(Args)]
pub(crate) struct Table {
    /// Print long lines whole: on a terminal they are cut at its edge, elsewhere never
    #[arg(short, long)]
    wide: bool,
}

/// The mark after a value: `!` in a row that changed during every read, `?` in one with parts that
/// could not be read.
pub(crate) fn mark(is_torn: bool, is_damaged: bool) -> &'static str {
    match (is_torn, is_damaged) {
        (_, true) => "?",
        (true, _) => "!",
        _ => "",
    }
}

/// The value, or a question mark where it could not be read.
pub(crate) fn or_unknown(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "?".to_owned(), |value| value.to_string())
}

impl Table {
    /// Prints the items: each as `line` makes JSON of it, or as `row` makes the cells of a table
    /// below `header`.
    pub(crate) fn print<T: Copy, L: Serialize, R: AsRef<[String]>>(
        &self,
        output: &mut Output,
        items: impl IntoIterator<Item = T>,
        line: impl Fn(T) -> L,
        header: impl IntoIterator<Item: Into<String>>,
        row: impl Fn(T) -> R,
    ) -> io::Result<()> {
        let mut items = items.into_iter();
        if output.is_json() {
            return items.try_for_each(|item| output.object(&line(item)));
        }
        let header = header.into_iter().map(Into::into).collect::<Vec<String>>();
        let rows: Vec<_> =
            std::iter::once(header).chain(items.map(|item| row(item).as_ref().to_vec())).collect();
        let width = output.width().filter(|_| !self.wide);
        columns(&rows).iter().try_for_each(|line| match width {
            Some(width) => output.line(cut(line, width)),
            None => output.line(line),
        })
    }
}
