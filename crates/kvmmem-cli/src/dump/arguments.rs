// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line of `kvmmem dump`.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::Result;
use clap::Args;
use kvmmem_client::admin::VcpuRegisters;

use super::layout::Format;
use super::path::{self, Kind};
use super::pause::Pause;
use super::sink::Compression;
use crate::number::{integer, parse};
use crate::range::{GpaRange, parse_range};
use crate::source::{Operator, Source};

#[derive(Args)]
#[command(after_help = AFTER_HELP)]
pub(crate) struct Arguments {
    /// The file to write, which only its owner may read; a FIFO, or - for standard output
    pub(super) file: PathBuf,
    /// The kind of file
    #[arg(long, value_enum, default_value_t = Format::Raw)]
    pub(super) format: Format,
    /// Dump only these guest-physical addresses, for example 1M..2M; END is not part of it; may
    /// be given again
    #[arg(long = "range", value_name = "START..END", value_parser = parse_range)]
    pub(super) ranges: Vec<GpaRange>,
    /// Go on with a dump that was not finished; the same target's, by a new token
    #[arg(long)]
    pub(super) resume: bool,
    /// Where to write the record of the dump [default: FILE.json; none for standard output or a
    /// FIFO]
    #[arg(long, value_name = "PATH")]
    pub(super) record: Option<PathBuf>,
    /// Leave the SHA-256 of the file out of the record: of a large target that uses little of its
    /// memory, it takes most of the time
    #[arg(long)]
    pub(super) no_hash: bool,
    /// Pause the target while its memory is read, so that the dump shows one moment. It runs again
    /// right after, and also if this command is killed, stopped or hangs; one that is not
    /// running stays as it is. With --target, where the broker has a QMP connection to the
    /// target's QEMU, or where it is a VM of kvmmem vm
    #[arg(long, conflicts_with = "resume")]
    pub(super) pause: bool,
    /// Compress the file or stream; a dump that was not finished cannot be resumed then
    #[arg(long, value_enum, value_name = "METHOD", conflicts_with = "resume")]
    pub(super) compress: Option<Compression>,
    /// Of a Linux guest: dump this process alone, as an ELF core that gdb opens with the process's
    /// program. What is not in memory is not in it
    #[arg(long, value_name = "PID", conflicts_with_all = ["format", "ranges", "resume"], value_parser = integer(0..=u32::MAX))]
    pub(super) pid: Option<u32>,
    /// With --pid: the process as it is in this dump file, instead of a target's
    #[arg(long = "file", value_name = "DUMP", requires = "pid", conflicts_with_all = ["pause", "target", "token", "token_file", "listen", "device", "broker"])]
    pub(super) dump: Option<PathBuf>,
    /// Of several kernels, the one whose VMCOREINFO note is at this guest-physical address
    #[arg(long, value_name = "GPA", value_parser = parse, requires = "pid", conflicts_with = "kernel")]
    pub(super) note: Option<u64>,
    /// Of several kernels, the one in the address space of this CR3, its own or that of one of its
    /// processes
    #[arg(long, value_name = "CR3", value_parser = parse, requires = "pid")]
    pub(super) kernel: Option<u64>,
    #[command(flatten)]
    pub(super) source: Source,
}

const AFTER_HELP: &str = "\
The file is sparse: what the target's host has not allocated takes no space, here or there. The target runs on meanwhile;
for a picture of one moment, --pause. Until the dump is complete, FILE.part tells how far it is. A dump of a target that
was reset, resized or started again since then is not resumed; without a broker, resets go unnoticed.

Beside the file, FILE.json says of which target it is, when it was made, what is in it, what could not be read or was left
out, and its SHA-256. On a pipe all holes are zeros, and what is said goes to standard error. With --compress, the SHA-256
and all sizes and offsets are those of what the file unpacks to.

--format elf has the VMCOREINFO note of a Linux target, so that crash, drgn and makedumpfile open the file as it is; and with
--target, where the broker has a QMP connection to its QEMU or it is a VM of kvmmem vm, the vCPUs' registers. Without --pause each vCPU's are of another
moment.

--pid writes a core as the kernel does (core(5)): threads, mappings, mapped files, auxiliary vector. The registers are those
with which a thread entered the kernel; those of a thread that runs are zeros, and are listed. Each thread's floating point
registers are left out.

Exit codes:
  0  the file is complete
  1  failed, or interrupted; where standard error says so, --resume goes on
  2  the command line is wrong
  3  the file is complete, but for memory that could not be read: zeros are in its place; with --pid, also for mappings or
     threads: standard error says which
  4  with --pid: the guest was restarted while it was read; the file is removed";

/// The vCPUs' registers, or why they are not known.
type Vcpus = Result<Vec<VcpuRegisters>, String>;

impl Arguments {
    /// Pauses the target where that is wanted, and asks for the vCPUs' registers. Returns a reason
    /// where they are not known.
    pub(super) fn hold(
        &self,
        operator: Option<Operator>,
        wants_vcpus: bool,
    ) -> Result<(Option<Pause>, Vcpus)> {
        let Some(mut operator) = operator else {
            let reason = "a token opens memory alone: on the host, name the target (--target)";
            return Ok((None, Err(reason.into())));
        };
        let began = Instant::now();
        let target = operator.target.clone();
        let paused = match self.pause {
            true => match operator.admin.pause(&target) {
                Ok(was_running) => Some(was_running),
                Err(error) => {
                    return Err(operator.explain(error).context("cannot pause the target"));
                }
            },
            false => None,
        };
        let vcpus = match wants_vcpus {
            true => operator
                .admin
                .registers(&target)
                .map_err(|error| format!("{:#}", operator.explain(error))),
            false => Ok(Vec::new()),
        };
        let pause =
            paused.map(|was_running| Pause::keep(operator, was_running, began)).transpose()?;
        Ok((pause, vcpus))
    }

    /// Where the record goes.
    pub(super) fn record_path(&self) -> Option<PathBuf> {
        let beside = || {
            let mut path = self.file.as_os_str().to_owned();
            path.push(".json");
            (path::kind(&self.file).ok()? == Kind::File).then(|| path.into())
        };
        self.record.clone().or_else(beside)
    }
}
