// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What `kvmmem dump` prints, and its exit code.

use std::path::Path;
use std::process::ExitCode;

use anyhow::Result;
use serde::Serialize;

use super::checkpoint::Checkpoint;
use super::layout::Format;
use super::pause::PauseReport;
use crate::escape::escape;
use crate::number::count;
use crate::output::Output;
use crate::range::{GpaRange, shown, total};
use crate::unreadable::UNREADABLE;

/// Prints what was dumped.
pub(super) fn print(
    file: &Path,
    record: &impl Serialize,
    (bytes, data_bytes, unreadable): (u64, u64, &[GpaRange]),
    output: &mut Output,
) -> Result<()> {
    let file = escape(&file.to_string_lossy());
    if output.is_json() {
        output.object(record)?;
    } else {
        output.line(format!(
            "{file}: {}, of which {data_bytes} were allocated in the target",
            count(bytes, "byte")
        ))?;
    }
    if !unreadable.is_empty() && !output.is_json() {
        output.line(format!(
            "{} of these could not be read and are zeros in the file: {}",
            count(total(unreadable), "byte"),
            shown(unreadable)
        ))?;
    }
    Ok(())
}

/// Prints which registers the dump has.
pub(super) fn print_vcpus(
    format: Format,
    checkpoint: &Checkpoint,
    pause: Option<PauseReport>,
    output: &mut Output,
) -> Result<()> {
    if let Some(pause) = pause {
        output.line(pause.to_string())?;
    }
    if format == Format::Elf {
        output.line(match &checkpoint.no_vcpus {
            Some(reason) => {
                format!("no registers are in it: {}", escape(reason))
            }
            None => {
                format!("the registers of {} are in it", count(checkpoint.vcpus.len(), "vCPU"))
            }
        })?;
    }
    Ok(())
}

/// The exit code once the file is complete.
pub(super) fn exit_code(unreadable: &[GpaRange]) -> ExitCode {
    if unreadable.is_empty() { ExitCode::SUCCESS } else { ExitCode::from(UNREADABLE) }
}
