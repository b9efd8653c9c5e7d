// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How an error is printed: what failed, then the numbered chain of causes.

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Error;
use clap::builder::styling::AnsiColor;
use clap::error::ErrorKind;
use serde::Serialize;

use crate::escape::{escape, json};

/// Exit code of a command line that is wrong.
pub(crate) const USAGE: u8 = 2;

/// An error with an exit code of its own.
#[derive(Debug, thiserror::Error)]
#[error("{text}")]
struct ExitError {
    code: u8,
    text: String,
}

/// An error with this exit code.
pub(crate) fn exit(code: u8, text: impl Into<String>) -> Error {
    ExitError { code, text: text.into() }.into()
}

/// What is wrong with a command line that clap accepts: an error with exit code [`USAGE`].
pub(crate) fn usage(text: impl Into<String>) -> Error {
    exit(USAGE, text)
}

/// The exit code that the error brings, if it is one of [`exit`].
pub(crate) fn exit_code(error: &Error) -> Option<u8> {
    error.downcast_ref().map(|ExitError { code, .. }| *code)
}

/// The reader of a pipe that this command writes to has closed it. The command ends by SIGPIPE
/// then, as other programs do.
#[derive(Debug, thiserror::Error)]
#[error("the reader has closed the pipe{consequence}")]
pub(crate) struct ClosedPipe {
    /// What the user must know; nothing is printed where it is empty.
    pub(crate) consequence: &'static str,
}

impl ClosedPipe {
    /// The one in the chain of an error.
    pub(crate) fn of(error: &Error) -> Option<&Self> {
        error.chain().find_map(|cause| {
            let of_io = || cause.downcast_ref::<io::Error>()?.get_ref()?.downcast_ref();
            cause.downcast_ref().or_else(of_io)
        })
    }
}

/// The error of a write to standard output, with what failed.
pub(crate) fn output_error(error: io::Error) -> io::Error {
    match error.kind() {
        kind @ io::ErrorKind::BrokenPipe => io::Error::new(kind, ClosedPipe { consequence: "" }),
        kind => io::Error::new(kind, format!("cannot write the output: {error}")),
    }
}

#[derive(Serialize)]
struct Failure {
    error: String,
    causes: Vec<String>,
}

/// Prints what clap says about the command line: help and versions to standard output, errors to
/// standard error.
pub(crate) fn report_clap(error: &clap::Error, json: bool) -> ExitCode {
    if error.use_stderr() {
        if json {
            report(&usage(clap_message(error)), json);
        } else {
            // There is no other place to report that standard error cannot be written.
            let _ = error.print();
        }
        return ExitCode::from(USAGE);
    }
    match error.print().and_then(|()| io::stdout().flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => end(&output_error(error).into(), json, 1),
    }
}

/// Reports the error and ends the command: by SIGPIPE where its reader has closed the pipe, else
/// with the error's exit code or `code`.
pub(crate) fn end(error: &Error, json: bool, code: u8) -> ExitCode {
    report(error, json);
    if ClosedPipe::of(error).is_some() {
        kvmmem_sys::sigpipe::die();
    }
    ExitCode::from(exit_code(error).unwrap_or(code))
}

/// What is wrong, without usage and colours, in one line.
fn clap_message(error: &clap::Error) -> String {
    let missing =
        [ErrorKind::MissingSubcommand, ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand];
    if missing.contains(&error.kind()) {
        return "a verb is missing: see --help".to_owned();
    }
    let text = error.render().to_string();
    let text = text.strip_prefix("error: ").unwrap_or(&text);
    let end =
        ["\n\nUsage:", "\n\nFor more information"].iter().filter_map(|part| text.find(part)).min();
    let words: Vec<&str> =
        text.get(..end.unwrap_or(text.len())).unwrap_or(text).split_whitespace().collect();
    words.join(" ")
}

/// Prints the error to standard error.
fn report(error: &Error, json: bool) {
    if ClosedPipe::of(error).is_some_and(|closed| closed.consequence.is_empty()) {
        return;
    }
    let mut stderr = anstream::stderr().lock();
    // There is no other place to report that standard error cannot be written.
    let _ = if json { write_json(&mut stderr, error) } else { write_text(&mut stderr, error) };
}

fn write_text(to: &mut impl Write, error: &Error) -> io::Result<()> {
    let red = AnsiColor::Red.on_default().bold();
    writeln!(to, "{red}error:{red:#} {}", escape(&error.to_string()))?;
    for (number, cause) in (1..).zip(error.chain().skip(1)) {
        writeln!(to, "  {number}: {}", escape(&cause.to_string()))?;
    }
    Ok(())
}

fn write_json(to: &mut impl Write, error: &Error) -> io::Result<()> {
    let failure = Failure {
        error: error.to_string(),
        causes: error.chain().skip(1).map(ToString::to_string).collect(),
    };
    writeln!(to, "{}", json(&failure)?)
}

#[cfg(test)]
mod tests {
    use anyhow::Context;

    use super::*;

    #[test]
    fn causes_are_numbered_and_cannot_drive_the_terminal() {
        let error = Err::<(), _>(io::Error::other("root\x1b[2J"))
            .context("middle")
            .context("top")
            .unwrap_err();
        let mut text = Vec::new();
        write_text(&mut anstream::StripStream::new(&mut text), &error).unwrap();
        assert_eq!(
            String::from_utf8(text).unwrap(),
            "error: top\n  1: middle\n  2: root\\u{1b}[2J\n"
        );
    }
}
