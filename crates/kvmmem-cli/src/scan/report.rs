// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How matches are printed.

use anyhow::{Result, anyhow};
use clap::builder::styling::Style;
use serde::Serialize;

use super::matches::{Around, Match};
use super::pattern::Pattern;
use crate::escape::escape;
use crate::hexdump::{self, WIDTH};
use crate::number::{Address, count, hex};
use crate::output::Output;

/// A match, as JSON.
#[derive(Serialize)]
struct MatchLine<'a> {
    #[serde(flatten)]
    address: Address,
    pattern: &'a str,
    len: usize,
    /// The bytes from its place on: 16, or the match and what was wanted after it.
    hex: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    before: Option<String>,
}

/// Prints matches.
pub(super) struct Report<'a> {
    pub(super) patterns: &'a [Pattern],
    pub(super) around: Around,
    /// What an address is.
    pub(super) address: &'a dyn Fn(u64) -> Address,
}

impl Report<'_> {
    /// Prints one.
    pub(super) fn print(&self, found: &Match, output: &mut Output) -> Result<()> {
        let pattern =
            self.patterns.get(found.pattern).ok_or_else(|| anyhow!("there is no such pattern"))?;
        let is_wide = self.around.before > 0 || self.around.after > 0;
        if output.is_json() {
            let found = MatchLine {
                address: (self.address)(found.gpa),
                pattern: pattern.name(),
                len: found.len,
                hex: hex(found.bytes()),
                before: is_wide.then(|| hex(found.before())),
            };
            return Ok(output.object(&found)?);
        }
        let name = match self.patterns {
            [_] => String::new(),
            _ => format!("  {}", escape(pattern.name())),
        };
        if !is_wide {
            let line = hexdump::line(found.gpa, found.bytes(), |at| bold(at < found.len));
            return Ok(output.styled(line + &name)?);
        }
        // As a hexdump of its surroundings, named once.
        output.line(format!("{:#x}, {}{name}", found.gpa, count(found.len, "byte")))?;
        let before = found.before().len();
        let shown = [found.before(), found.bytes()].concat();
        let is_match = before..before + found.len;
        let start = found.gpa.wrapping_sub(before as u64);
        for (number, line) in shown.chunks(WIDTH).enumerate() {
            let first = number * WIDTH;
            let line = hexdump::line(start.wrapping_add(first as u64), line, |at| {
                bold(is_match.contains(&(first + at)))
            });
            output.styled(line)?;
        }
        Ok(output.line("")?)
    }
}

fn bold(is: bool) -> Option<Style> {
    is.then(|| Style::new().bold())
}
