// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which kernel runs, how it was started, and since when.

use std::time::Duration;

use crate::bytes::{Bytes, text};
use crate::kernel::{Kernel, KernelError};

/// The longest command line of a kernel that is read (`COMMAND_LINE_SIZE`).
const COMMAND_LINE: usize = 2048;

/// Bytes of each name of `struct new_utsname`.
const UTS_LEN: u64 = 65;

/// Offset of the names in `struct uts_namespace`, for kernels whose note lacks it.
const UTS_NAME_AT: i64 = 4;

/// Offset of the `struct timekeeper` in `tk_core`, for kernels whose type has no name: it follows a
/// sequence counter.
const TIMEKEEPER_AT: u64 = 8;

/// The most bytes of the time that are read.
const MAX_LEN: u64 = 4096;

/// Reads of the time while the kernel writes it.
const TRIES: u32 = 8;

/// A kernel. A value that was not found is `None`; [`Identity::missing`] has the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// As `uname -r` prints it.
    pub release: String,
    /// As `uname -v` prints it.
    pub version: String,
    /// The machine's name in the first namespace.
    pub host_name: String,
    /// What the linker called the kernel's image, in hexadecimal digits.
    pub build_id: Option<String>,
    /// What the kernel was started with.
    pub command_line: Option<String>,
    /// How far the kernel's image was moved; 0 without KASLR.
    pub kaslr_offset: u64,
    /// When it was started, since 1970.
    pub booted: Option<Duration>,
    /// How long it had run when it last looked at its clock.
    pub uptime: Option<Duration>,
    /// What could not be found out.
    pub missing: Vec<Missing>,
}

/// Something of a kernel that could not be found out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Missing {
    /// What it is.
    pub what: &'static str,
    /// Why.
    pub why: String,
}

impl Missing {
    fn new(what: &'static str, error: &KernelError) -> Self {
        let mut why = error.to_string();
        let mut cause = std::error::Error::source(error);
        while let Some(error) = cause {
            why += &format!(": {error}");
            cause = error.source();
        }
        Self { what, why }
    }
}

impl Identity {
    /// Looks at a kernel.
    ///
    /// # Errors
    /// [`KernelError`]: its names cannot be read.
    pub fn of(kernel: &Kernel<'_>) -> Result<Self, KernelError> {
        let mut names = Bytes::zeroed(6 * UTS_LEN);
        kernel.read(names_at(kernel)?, names.as_mut())?;
        let name = |number| names.string(number * UTS_LEN, UTS_LEN);
        let note = kernel.note();
        let offset =
            note.value("KERNELOFFSET").and_then(|value| u64::from_str_radix(value, 16).ok());
        let mut missing = Vec::new();
        let build_id = note.value("BUILD-ID").map(str::to_owned);
        if build_id.is_none() {
            missing.push(Missing {
                what: "the build id",
                why: "the kernel's note has no BUILD-ID".to_owned(),
            });
        }
        let command_line = command_line(kernel);
        let command_line =
            command_line.map_err(|error| missing.push(Missing::new("the command line", &error)));
        let clock =
            clock(kernel).map_err(|error| missing.push(Missing::new("the boot time", &error))).ok();
        Ok(Self {
            host_name: name(1),
            release: name(2),
            version: name(3),
            build_id,
            command_line: command_line.ok(),
            kaslr_offset: offset.unwrap_or(0),
            booted: clock.map(|clock| clock.booted),
            uptime: clock.map(|clock| clock.uptime),
            missing,
        })
    }
}

/// Where the first namespace has the names (`struct new_utsname`).
fn names_at(kernel: &Kernel<'_>) -> Result<u64, KernelError> {
    let offset = kernel.note().number("OFFSET(uts_namespace.name)").unwrap_or(UTS_NAME_AT);
    let namespace = kernel.note().symbol("init_uts_ns").ok_or(KernelError::Note)?;
    Ok(namespace.wrapping_add_signed(offset))
}

fn command_line(kernel: &Kernel<'_>) -> Result<String, KernelError> {
    let line = kernel.read_u64(kernel.symbol("saved_command_line")?)?;
    let line = text(&kernel.read_cstr(line, COMMAND_LINE)?);
    Ok(line.trim().to_owned())
}

/// Time of the kernel's clock.
#[derive(Clone, Copy)]
struct Clock {
    booted: Duration,
    uptime: Duration,
}

/// The kernel's `struct timekeeper`.
fn clock(kernel: &Kernel<'_>) -> Result<Clock, KernelError> {
    let place = kernel.symbol("timekeeper_data").or_else(|_| kernel.symbol("tk_core"))?;
    let at = kernel.offset("tk_data", "timekeeper").unwrap_or(TIMEKEEPER_AT);
    let keeper = |member| kernel.offset("timekeeper", member);
    let base = |member| kernel.offset("tk_read_base", member);
    let mono = keeper("tkr_mono")?;
    let (real, boot) = (keeper("offs_real")?, keeper("offs_boot")?);
    let (ns, shift) = (mono + base("xtime_nsec")?, mono + base("shift")?);
    let mono = mono + base("base")?;
    let len = MAX_LEN.min(ns.max(shift).max(real).max(boot).max(mono) + 8);
    let gva = place.wrapping_add(at);
    let read = || {
        let mut bytes = Bytes::zeroed(len);
        kernel.read(gva, bytes.as_mut())?;
        Ok::<_, KernelError>(bytes)
    };
    for _ in 0..TRIES {
        let (one, two) = (read()?, read()?);
        if one == two {
            let nanoseconds = one.u64(ns) >> one.u32(shift).min(63);
            let boot = one.u64(boot);
            return Ok(Clock {
                booted: Duration::from_nanos(one.u64(real).wrapping_sub(boot)),
                uptime: Duration::from_nanos(
                    one.u64(mono).wrapping_add(nanoseconds).wrapping_add(boot),
                ),
            });
        }
    }
    Err(KernelError::Malformed {
        what: "the kernel's clock, which changed whenever it was read,".to_owned(),
        gva,
    })
}
