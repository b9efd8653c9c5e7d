// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The record of a complete dump: what it is of, what is in it and what is not. A JSON object in a
//! file beside it, and what `--json` prints.

use std::fs;
use std::path::Path;

use anyhow::Result;
use kvmmem_client::admin::VcpuRegisters;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::checkpoint::{Checkpoint, now_ms, replace};
use super::layout::Format;
use super::pause::PauseReport;
use super::sink::Compression;
use crate::number::{self, Hex};
use crate::range::{GpaRange, RangeLine};

#[derive(Serialize)]
pub(super) struct Record<'a> {
    /// Version of the program that wrote the dump.
    kvmmem: &'static str,
    /// The path that was given; - is standard output.
    file: &'a str,
    format: Format,
    /// How the file is compressed; all sizes, offsets and the digest are of what it unpacks to.
    compression: Option<Compression>,
    /// UUID of the target.
    target: Uuid,
    /// Its name, which is known on the host.
    name: Option<&'a str>,
    /// Which run of it: another number after each reset, change of its RAM or start.
    instance: Option<u64>,
    started_ms: u64,
    ended_ms: u64,
    /// Length of the file.
    bytes: u64,
    /// The same of one that is compressed.
    compressed_bytes: Option<u64>,
    /// How many of these were read from the target. The rest was not allocated by its host, and is
    /// zeros.
    data_bytes: u64,
    /// Of the whole file; none with --no-hash.
    sha256: Option<String>,
    /// Whether it was interrupted and went on.
    resumed: bool,
    ranges: Vec<RangeLine>,
    /// What could not be read: zeros are in its place.
    unreadable: Vec<RangeLine>,
    /// What was asked for, or lies between the ranges, and is not in the file: no RAM is there, or
    /// it was not granted.
    left_out: Vec<RangeLine>,
    /// The kernel's note that is in the file.
    vmcoreinfo: Option<KernelNote<'a>>,
    /// The vCPUs' registers that are in an ELF core.
    registers: Option<Registers<'a>>,
    /// Where the kernel maps all physical memory; the addresses in an ELF core use it.
    direct_map: Option<Hex>,
    /// The target's pause, if there was one.
    pause: Option<PauseReport>,
}

#[derive(Serialize)]
struct Registers<'a> {
    /// Of how many vCPUs.
    vcpus: usize,
    /// Where they come from: QEMU's monitor.
    source: Option<&'static str>,
    /// Why there are none.
    reason: Option<&'a str>,
}

/// Outcome of a complete dump, besides its checkpoint.
pub(super) struct Outcome {
    /// Length of the file, of one that is compressed what it unpacks to.
    pub(super) bytes: u64,
    pub(super) compression: Option<Compression>,
    pub(super) compressed_bytes: Option<u64>,
    pub(super) resumed: bool,
    pub(super) sha256: Option<String>,
    pub(super) pause: Option<PauseReport>,
}

#[derive(Serialize)]
struct KernelNote<'a> {
    gpa: Hex,
    release: Option<&'a str>,
}

impl<'a> Record<'a> {
    pub(super) fn new(
        file: &'a str,
        name: Option<&'a str>,
        checkpoint: &'a Checkpoint,
        outcome: &Outcome,
        left_out: &[GpaRange],
    ) -> Self {
        let list = |ranges: &[GpaRange]| {
            ranges
                .iter()
                .map(|range| RangeLine::new(range.start, range.end - range.start))
                .collect()
        };
        let release = |text: &'a str| text.lines().find_map(|line| line.strip_prefix("OSRELEASE="));
        let vmcoreinfo = checkpoint.vmcoreinfo.as_ref();
        Self {
            kvmmem: env!("CARGO_PKG_VERSION"),
            file,
            format: checkpoint.format,
            compression: outcome.compression,
            target: checkpoint.uuid,
            name,
            instance: checkpoint.instance,
            started_ms: checkpoint.started_ms,
            ended_ms: now_ms(),
            bytes: outcome.bytes,
            compressed_bytes: outcome.compressed_bytes,
            data_bytes: checkpoint.data_bytes,
            sha256: outcome.sha256.clone(),
            resumed: outcome.resumed,
            ranges: list(&checkpoint.ranges),
            unreadable: list(&checkpoint.unreadable),
            left_out: list(left_out),
            vmcoreinfo: vmcoreinfo
                .map(|(gpa, text)| KernelNote { gpa: Hex(*gpa), release: release(text) }),
            registers: (checkpoint.format == Format::Elf).then_some(Registers {
                vcpus: checkpoint.vcpus.len(),
                source: source(&checkpoint.vcpus),
                reason: checkpoint.no_vcpus.as_deref(),
            }),
            direct_map: checkpoint.direct_map.map(Hex),
            pause: outcome.pause,
        }
    }

    /// Writes it to a file, which is there as a whole or not at all.
    pub(super) fn save(&self, path: &Path) -> Result<()> {
        let mut text = serde_json::to_vec_pretty(self)?;
        text.push(b'\n');
        replace(path, &text)
    }
}

/// Where the registers come from; `None` without registers. QEMU's monitor does not show MSR_LSTAR,
/// kvmmem-vmm does.
fn source(vcpus: &[VcpuRegisters]) -> Option<&'static str> {
    let first = vcpus.first()?;
    Some(if first.lstar.is_some() { "kvmmem-vmm" } else { "qmp" })
}

/// The record of a dump whose checkpoint was not removed.
pub(super) struct SavedRecord {
    /// As it was written.
    pub(super) record: Value,
    bytes: u64,
    data_bytes: u64,
    unreadable: Vec<GpaRange>,
}

impl SavedRecord {
    /// The record at `path`, if it is of the dump with this checkpoint and this length: it is
    /// written last of all.
    pub(super) fn load(path: &Path, checkpoint: &Checkpoint, len: u64) -> Option<Self> {
        if !path.metadata().ok()?.is_file() {
            return None;
        }
        let record: Value = serde_json::from_slice(&fs::read(path).ok()?).ok()?;
        let range = |line: &Value| {
            let start = number::parse(line.get("gpa")?.as_str()?).ok()?;
            Some(start..start.checked_add(line.get("len")?.as_u64()?)?)
        };
        let number = |name| record.get(name).and_then(Value::as_u64);
        let is_its = record.get("target")?.as_str()? == checkpoint.uuid.to_string()
            && number("started_ms") == Some(checkpoint.started_ms)
            && number("bytes") == Some(len);
        let unreadable =
            record.get("unreadable")?.as_array()?.iter().map(range).collect::<Option<_>>()?;
        let data_bytes = number("data_bytes")?;
        is_its.then_some(Self { record, bytes: len, data_bytes, unreadable })
    }

    /// The file's length, how many bytes were read from the target, and what could not be read.
    pub(super) fn sizes(&self) -> (u64, u64, &[GpaRange]) {
        (self.bytes, self.data_bytes, &self.unreadable)
    }
}
