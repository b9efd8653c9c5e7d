// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The record of a process's core: what it is of and what is in it.

use std::path::Path;

use anyhow::Result;
use serde::Serialize;

use super::checkpoint::replace;
use super::pause::PauseReport;
use super::sink::Compression;
use crate::escape::escape;
use crate::number::count;
use crate::output::Output;

/// A complete core, in the record and on standard output.
#[derive(Serialize)]
pub(super) struct CoreRecord<'a> {
    /// Version of the program that wrote the core.
    pub(super) kvmmem: &'static str,
    /// The path that was given; - is standard output.
    pub(super) file: &'a str,
    pub(super) compression: Option<Compression>,
    /// UUID and name of the target; none for a process in a dump file.
    pub(super) target: Option<uuid::Uuid>,
    pub(super) name: Option<&'a str>,
    /// The dump file that the process is in.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) dump: Option<&'a str>,
    /// The process.
    pub(super) pid: u32,
    pub(super) comm: &'a str,
    /// Length of the file, of one that is compressed what it unpacks to; and the length of that
    /// one.
    pub(super) bytes: u64,
    pub(super) compressed_bytes: Option<u64>,
    /// How many bytes the process has mapped, and how many of these are in the file: the rest was
    /// not in memory.
    pub(super) mapped_bytes: u64,
    pub(super) memory_bytes: u64,
    /// How many of these could not be read: they are zeros.
    pub(super) unreadable_bytes: u64,
    /// How many threads there are, and how many of the guest's could not be read: some may be the
    /// process's.
    pub(super) threads: usize,
    pub(super) lost_threads: usize,
    /// The threads without registers, which are zeros: they run.
    pub(super) without_registers: Vec<u32>,
    /// Whether the process changed its mappings during every read.
    pub(super) torn: bool,
    /// Whether mappings, or the names of their files, or something of a thread, could not be read.
    pub(super) damaged: bool,
    pub(super) sha256: Option<String>,
    pub(super) pause: Option<PauseReport>,
}

impl CoreRecord<'_> {
    /// Writes it to a file, which is there as a whole or not at all.
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        replace(path, &text)
    }

    /// Prints it.
    pub(super) fn print(&self, output: &mut Output) -> Result<()> {
        if output.is_json() {
            return Ok(output.object(self)?);
        }
        output.line(format!(
            "{}: process {} ({}), {} of the {} that it has mapped were in memory",
            escape(self.file),
            self.pid,
            escape(self.comm),
            count(self.memory_bytes, "byte"),
            self.mapped_bytes
        ))?;
        if self.unreadable_bytes > 0 {
            output.line(format!(
                "{} of these could not be read and are zeros",
                count(self.unreadable_bytes, "byte")
            ))?;
        }
        if !self.without_registers.is_empty() {
            let (without, all) = (self.without_registers.len(), self.threads);
            output.line(format!(
                "registers of {without} of {} are zeros, as these run",
                count(all, "thread")
            ))?;
        }
        if self.torn {
            output.line(
                "the process changed its mappings meanwhile: some may be missing; --pause helps",
            )?;
        }
        if let Some(pause) = self.pause {
            output.line(pause.to_string())?;
        }
        Ok(())
    }
}
