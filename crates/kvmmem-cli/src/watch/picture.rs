// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory as it is shown while it changes.

use std::io::IsTerminal;
use std::ops::Range;
use std::time::Instant;

use anyhow::Result;
use clap::builder::styling::{AnsiColor, Style};
use rustix::termios::tcgetwinsize;
use serde::Serialize;

use crate::hexdump::{self, WIDTH};
use crate::number::{Address, hex};
use crate::output::Output;

/// How changed bytes look.
const CHANGED: Style = AnsiColor::Red.on_default().bold();

/// The memory that is shown, and how.
pub(super) struct Picture {
    address: Address,
    form: Form,
    start: Instant,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Form {
    /// All of it, drawn over the last picture.
    InPlace,
    /// Lines that have changed.
    Lines,
    Json,
}

/// What is seen, as JSON. Times are milliseconds since the first look.
#[derive(Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum LookLine {
    Memory {
        #[serde(flatten)]
        address: Address,
        hex: String,
    },
    Changed {
        ms: u64,
        #[serde(flatten)]
        address: Address,
        from: String,
        to: String,
    },
    Reset {
        ms: u64,
    },
}

impl Picture {
    /// Shows what lies at `address` at first.
    pub(super) fn begin(address: Address, bytes: &[u8], output: &mut Output) -> Result<Self> {
        let form = match output.is_json() {
            true => Form::Json,
            false if has_room(bytes.len().div_ceil(WIDTH)) => Form::InPlace,
            false => Form::Lines,
        };
        if form == Form::Json {
            output.object(&LookLine::Memory { address, hex: hex(bytes) })?;
        } else {
            for (_, line) in lines(address.get(), bytes, bytes) {
                output.styled(line)?;
            }
        }
        Ok(Self { address, form, start: Instant::now() })
    }

    /// Shows what has changed.
    pub(super) fn go_on(&self, before: &[u8], now: &[u8], output: &mut Output) -> Result<()> {
        match self.form {
            Form::InPlace => {
                // Where colours are switched off, the cursor must move all the same.
                output.raw(format!("\x1b[{}A", now.len().div_ceil(WIDTH)).as_bytes())?;
                for (_, line) in lines(self.address.get(), before, now) {
                    output.styled(line)?;
                }
            }
            Form::Lines => {
                let time = self.start.elapsed().as_secs_f64();
                for (_, line) in
                    lines(self.address.get(), before, now).filter(|(has_changed, _)| *has_changed)
                {
                    output.styled(format!("{time:10.3}  {line}"))?;
                }
            }
            Form::Json => {
                let ms = self.elapsed_ms();
                for change in changes(before, now) {
                    let address = self.address.plus(change.start as u64);
                    let part = |bytes: &[u8]| hex(bytes.get(change.clone()).unwrap_or_default());
                    output.object(&LookLine::Changed {
                        ms,
                        address,
                        from: part(before),
                        to: part(now),
                    })?;
                }
            }
        }
        Ok(())
    }

    /// Milliseconds since the first look.
    fn elapsed_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// Prints that the target was reset or its memory resized.
    pub(super) fn tell_reset(&self, output: &mut Output) -> Result<()> {
        if self.form == Form::Json {
            output.object(&LookLine::Reset { ms: self.elapsed_ms() })?;
        } else {
            tracing::warn!("the target was reset, or its memory resized");
        }
        Ok(())
    }
}

/// Whether standard output is a terminal on which so many lines can be drawn again and again.
fn has_room(lines: usize) -> bool {
    let stdout = std::io::stdout();
    stdout.is_terminal() && tcgetwinsize(&stdout).is_ok_and(|size| lines < size.ws_row.into())
}

/// The lines of a dump, and which of them have changed.
fn lines<'a>(
    gpa: u64,
    before: &'a [u8],
    now: &'a [u8],
) -> impl Iterator<Item = (bool, String)> + 'a {
    let pairs = before.chunks(WIDTH).zip(now.chunks(WIDTH));
    pairs.zip((gpa..).step_by(WIDTH)).map(|((before, now), gpa)| {
        let style = |at| (before.get(at) != now.get(at)).then_some(CHANGED);
        (before != now, hexdump::line(gpa, now, style))
    })
}

/// The places, as long as can be, at which every byte has changed.
fn changes(before: &[u8], now: &[u8]) -> Vec<Range<usize>> {
    let mut changes: Vec<Range<usize>> = Vec::new();
    for (at, _) in before.iter().zip(now).enumerate().filter(|(_, (before, now))| before != now) {
        match changes.last_mut() {
            Some(last) if last.end == at => last.end += 1,
            _ => changes.push(at..at + 1),
        }
    }
    changes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_found_and_marked() {
        let before = [0; 40];
        let mut now = before;
        for at in [0, 1, 15, 16, 39] {
            now[at] = 0xaa;
        }
        assert_eq!(changes(&before, &now), [0..2, 15..17, 39..40]);
        assert!(changes(&now, &now).is_empty());

        let lines: Vec<(bool, String)> = lines(u64::MAX - 39, &before, &now).collect();
        let marks: Vec<usize> =
            lines.iter().map(|(_, line)| line.matches("\x1b[0m").count()).collect();
        // In hexadecimal and as text.
        assert_eq!(marks, [6, 2, 2]);
        assert!(lines.iter().all(|(has_changed, _)| *has_changed));
        assert!(
            super::lines(0, &now, &now)
                .all(|(has_changed, line)| !has_changed && !line.contains('\x1b'))
        );
    }
}
