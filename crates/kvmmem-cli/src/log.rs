// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Warnings on standard error, or the log that RUST_LOG asks for. The audit lines of a command that
//! is its own broker go to the journal; where there is no journal, to standard error.
//!
//! With `--json` each line on standard error is an object. Those of the log have the key `level`,
//! errors the key `error`.

use std::fmt;
use std::io::{self, IsTerminal, Write};

use kvmmem_proto::name::is_unprintable;

use clap::builder::styling::AnsiColor;
use kvmmem_broker::AUDIT_TARGET;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::FmtContext;
use tracing_subscriber::fmt::format::{FormatEvent, FormatFields, Writer};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

use crate::escape::escape_json;

/// Starts logging.
pub(crate) fn start(json: bool) {
    let journal = tracing_journald::layer().ok();
    let usual = if journal.is_some() { "warn" } else { "warn,audit=info" };
    let wanted = EnvFilter::try_from_env("RUST_LOG").ok();
    let is_wanted = wanted.is_some();
    let filter = wanted.unwrap_or_else(|| EnvFilter::new(usual));
    let lines = tracing_subscriber::fmt::layer();
    let lines = if json {
        let stderr = || EscapingWriter { to: io::stderr(), escape: escape_json };
        lines.json().with_current_span(false).with_span_list(false).with_writer(stderr).boxed()
    } else {
        let stderr = || EscapingWriter { to: io::stderr(), escape: escape_text };
        let lines = lines.with_ansi(io::stderr().is_terminal()).with_writer(stderr);
        if is_wanted { lines.boxed() } else { lines.event_format(Message).boxed() }
    };
    let audit = Targets::new().with_target(AUDIT_TARGET, LevelFilter::INFO);
    let journal = journal.map(|layer| layer.with_filter(audit));
    tracing_subscriber::registry().with(lines.with_filter(filter)).with(journal).init();
}

/// Formats an event as a message to the user: `warning: ` and its text. RUST_LOG asks for a log
/// instead, with times and modules.
struct Message;

impl<S, N> FormatEvent<S, N> for Message
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut to: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let metadata = event.metadata();
        let (kind, colour) = match *metadata.level() {
            _ if metadata.target() == AUDIT_TARGET => ("audit", AnsiColor::Cyan),
            Level::ERROR => ("error", AnsiColor::Red),
            Level::WARN => ("warning", AnsiColor::Yellow),
            _ => ("note", AnsiColor::Cyan),
        };
        if to.has_ansi_escapes() {
            let style = colour.on_default().bold();
            write!(to, "{style}{kind}:{style:#} ")?;
        } else {
            write!(to, "{kind}: ")?;
        }
        context.format_fields(to.by_ref(), event)?;
        writeln!(to)
    }
}

/// A line of the log without what a terminal would not just show. Its colours stay: the values in
/// it have no escape character, as tracing-subscriber has replaced it.
fn escape_text(line: &str) -> String {
    let keeps = |c: char| matches!(c, '\n' | '\x1b') || !is_unprintable(c);
    let mut escaped = String::with_capacity(line.len());
    for c in line.chars() {
        if keeps(c) { escaped.push(c) } else { escaped.extend(c.escape_default()) }
    }
    escaped
}

/// Writes lines after an escape.
struct EscapingWriter<W> {
    to: W,
    escape: fn(&str) -> String,
}

impl<W: Write> Write for EscapingWriter<W> {
    /// tracing-subscriber writes a line at a time.
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.to.write_all((self.escape)(&String::from_utf8_lossy(line)).as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_in_lines_cannot_drive_the_terminal() {
        let mut to = Vec::new();
        let line = "\x1b[2mWARN\x1b[0m the release is \u{202e}x\u{9b}2J\n";
        EscapingWriter { to: &mut to, escape: escape_text }.write_all(line.as_bytes()).unwrap();
        let text = String::from_utf8(to).unwrap();
        assert_eq!(text, "\x1b[2mWARN\x1b[0m the release is \\u{202e}x\\u{9b}2J\n");
    }
}
