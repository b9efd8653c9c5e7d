// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Entries of system calls and interrupts: each must lead into the kernel's text, and those of system calls and exceptions to
//! the begin of a function.

use std::cell::OnceCell;

use iced_x86::{Decoder, DecoderOptions, OpKind};

use super::{Finding, Place, Report, modules_of};
use crate::bytes::Bytes;
use crate::kernel::{Kernel, KernelError};
use crate::modules::Module;

/// The function that calls the handlers of system calls.
pub(super) const DISPATCHER: &str = "x64_sys_call";

/// The most system calls, and bytes of the dispatcher.
const MAX_CALLS: u64 = 1024;
const MAX_DISPATCHER: u64 = 64 << 10;

/// Gates of the IDT (`struct gate_struct`), and those of exceptions, whose handlers have names.
const GATES: u64 = 256;
const GATE_LEN: u64 = 16;
const EXCEPTIONS: u64 = 32;

/// The handlers that the kernel begins with, and bytes of each, without and with IBT. Exceptions that the CPU does not have
/// keep them; their memory is freed.
const EARLY: &str = "early_idt_handler_array";
const EARLY_LENS: [u64; 2] = [9, 13];

/// Where a gate has the bit that it is used.
const PRESENT_AT: u64 = 5;
const PRESENT: u8 = 0x80;

/// The kernel's text.
struct Text<'a> {
    kernel: &'a Kernel<'a>,
    start: u64,
    end: u64,
    /// Those that entries may lead into, read when the first one leads out of the text.
    modules: OnceCell<Vec<Module>>,
}

impl<'a> Text<'a> {
    fn new(kernel: &'a Kernel<'a>) -> Result<Self, KernelError> {
        Ok(Self {
            kernel,
            start: kernel.symbol("_stext")?,
            end: kernel.symbol("_etext")?,
            modules: OnceCell::new(),
        })
    }

    fn has(&self, gva: u64) -> bool {
        (self.start..self.end).contains(&gva)
    }

    /// Whether a function begins there.
    fn begins(&self, gva: u64) -> Result<bool, KernelError> {
        let nearest = self.kernel.symbols()?.nearest(gva);
        Ok(self.has(gva) && nearest.is_some_and(|symbol| symbol.address == gva))
    }

    fn hook(&self, entry: String, gva: u64, target: u64) -> Finding {
        let modules = self.modules.get_or_init(|| modules_of(self.kernel));
        Finding::Hook { entry, gva, target, place: Place::of(self.kernel, modules, target) }
    }
}

/// `sys_call_table`.
pub(super) fn system_calls(kernel: &Kernel<'_>) -> Result<Report, KernelError> {
    let text = Text::new(kernel)?;
    let (start, bytes) = object(kernel, "sys_call_table", MAX_CALLS * 8)?;
    let mut targets: Vec<u64> = (0..bytes.len() / 8).map(|number| bytes.u64(number * 8)).collect();
    // What follows up to the next symbol is not the table's.
    targets.truncate(targets.iter().rposition(|target| *target != 0).map_or(0, |last| last + 1));
    let mut report = Report { examined: targets.len(), findings: Vec::new() };
    for (number, target) in (0..).zip(targets) {
        if !text.begins(target)? {
            report.findings.push(text.hook(format!("system call {number}"), start + number * 8, target));
        }
    }
    Ok(report)
}

/// Branches of `x64_sys_call` that leave it.
pub(super) fn dispatcher(kernel: &Kernel<'_>) -> Result<Report, KernelError> {
    let text = Text::new(kernel)?;
    let (start, bytes) = object(kernel, DISPATCHER, MAX_DISPATCHER)?;
    let own = start..start + bytes.len();
    let mut report = Report::default();
    for instruction in &mut Decoder::with_ip(64, bytes.as_ref(), start, DecoderOptions::NONE) {
        if instruction.op0_kind() != OpKind::NearBranch64 || own.contains(&instruction.near_branch_target()) {
            continue;
        }
        report.examined += 1;
        if !text.has(instruction.near_branch_target()) {
            let entry = format!("branch of {DISPATCHER} at +{:#x}", instruction.ip() - start);
            report.findings.push(text.hook(entry, instruction.ip(), instruction.near_branch_target()));
        }
    }
    Ok(report)
}

/// Gates of `idt_table`.
pub(super) fn interrupts(kernel: &Kernel<'_>) -> Result<Report, KernelError> {
    let text = Text::new(kernel)?;
    let start = kernel.symbol("idt_table")?;
    let early = kernel.symbol(EARLY).ok();
    let mut bytes = Bytes::zeroed(GATES * GATE_LEN);
    kernel.read(start, bytes.as_mut())?;
    let mut report = Report::default();
    for vector in 0..GATES {
        let at = vector * GATE_LEN;
        if bytes.u8(at + PRESENT_AT) & PRESENT == 0 {
            continue;
        }
        report.examined += 1;
        let low = u64::from(bytes.u16(at)) | u64::from(bytes.u16(at + 6)) << 16;
        let target = low | u64::from(bytes.u32(at + 8)) << 32;
        let is_early = |start: u64| EARLY_LENS.iter().any(|len| start.wrapping_add(vector * len) == target);
        let is_fine = match vector < EXCEPTIONS {
            true => text.begins(target)? || early.is_some_and(is_early),
            false => text.has(target),
        };
        if !is_fine {
            report.findings.push(text.hook(format!("interrupt vector {vector}"), start + at, target));
        }
    }
    Ok(report)
}

/// The bytes from a symbol to the next one, at most `max`.
fn object(kernel: &Kernel<'_>, name: &str, max: u64) -> Result<(u64, Bytes), KernelError> {
    let start = kernel.symbol(name)?;
    let end = kernel.symbols()?.above(start).unwrap_or(u64::MAX);
    let mut bytes = Bytes::zeroed((end - start).min(max));
    kernel.read(start, bytes.as_mut())?;
    Ok((start, bytes))
}
