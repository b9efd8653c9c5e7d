// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Entries of system calls and interrupts: each must lead to its own handler, by its name; where
//! that is not known, to a handler of that kind to which no other entry leads. Branches of the
//! dispatcher must lead into the kernel's text.

use std::cell::OnceCell;
use std::collections::HashMap;

use iced_x86::{Decoder, DecoderOptions, OpKind};

use super::finding::{Finding, Place, Report};
use super::{calls, modules};
use crate::bytes::Bytes;
use crate::kernel::{Kernel, KernelError};
use crate::modules::Module;

/// The function that calls the handlers of system calls.
pub(super) const DISPATCHER: &str = "x64_sys_call";

/// The most system calls, and bytes of the dispatcher.
const MAX_CALLS: u64 = 1024;
const MAX_DISPATCHER: u64 = 64 << 10;

/// Names of handlers: of system calls of 64 bits; of those of x32, which begin at 512; and of calls
/// that a kernel does not have, which share theirs.
const CALL: &str = "__x64_sys_";
const X32_CALLS: [&str; 5] =
    [CALL, "__x64_compat_sys_", "__x32_", "__ia32_sys_", "__ia32_compat_sys_"];
const FIRST_X32: u64 = 512;
const NO_CALL: [&str; 3] = ["__x64_sys_ni_syscall", "sys_ni_syscall", "__do_sys_ni_syscall"];

/// Names of the functions that gates lead to, and of the stubs of devices' interrupts, which lie in
/// a row below one name.
const GATE_NAMES: [&str; 7] = [
    "asm_exc_",
    "asm_sysvec_",
    "asm_common_interrupt",
    "asm_spurious_interrupt",
    "asm_int80_emulation",
    "entry_INT80_compat",
    "xen_asm_",
];
const STUBS: [&str; 2] = ["irq_entries_start", "spurious_entries_start"];

/// Kernels of before 5.8, and those built in other ways, have other names: of the kernel that has
/// these all entries do.
const KNOWN_CALL: &str = "__x64_sys_read";
const KNOWN_GATE: &str = "asm_exc_page_fault";

/// Gates of the IDT (`struct gate_struct`), and those of exceptions, whose handlers have names.
const GATES: u64 = 256;
const GATE_LEN: u64 = 16;
const EXCEPTIONS: u64 = 32;

/// The handlers that the kernel begins with, and bytes of each, without and with IBT. Exceptions
/// that the CPU does not have keep them; their memory is freed.
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
    /// Modules that entries may lead into, read when the first entry leads out of the text.
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

    /// Whether one of the names of a function that begins there fits.
    fn is_named(&self, gva: u64, fits: impl Fn(&str) -> bool) -> Result<bool, KernelError> {
        // The compiler moves what is seldom executed of a function out of it.
        Ok(self
            .kernel
            .symbols()?
            .at_address(gva)
            .any(|symbol| fits(&symbol.name) && !symbol.name.contains(".cold")))
    }

    fn hook(&self, entry: String, gva: u64, target: u64) -> Finding {
        let modules = self.modules.get_or_init(|| modules::all(self.kernel));
        Finding::Hook {
            entry,
            gva: Some(gva),
            target,
            place: Place::of(self.kernel, modules, target),
        }
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
    let has_names = kernel.symbol(KNOWN_CALL).is_ok();
    let mut numbers = HashMap::new();
    for (number, target) in (0u64..).zip(targets) {
        let is_none = text.is_named(target, |name| NO_CALL.contains(&name))?;
        let names = if number < FIRST_X32 { &X32_CALLS[..1] } else { &X32_CALLS[..] };
        let is_call = !has_names
            || text.is_named(target, |name| names.iter().any(|begin| name.starts_with(begin)))?;
        let at = start + number * 8;
        if !text.begins(target)? || !is_none && !is_call {
            report.findings.push(text.hook(format!("system call {number}"), at, target));
            continue;
        }
        // A kernel that has the handler of this number has it here.
        let own = calls::handler(number).map(|name| format!("{CALL}{name}"));
        if let Some(own) = own.filter(|own| has_names && kernel.symbol(own).is_ok()) {
            match text.is_named(target, |name| name == own)? {
                true => _ = numbers.insert(target, number),
                false => {
                    report.findings.push(text.hook(format!("system call {number}"), at, target));
                }
            }
            continue;
        }
        // Calls of x32 have the handlers of others.
        if has_names
            && !is_none
            && number < FIRST_X32
            && let Some(other) = numbers.insert(target, number)
        {
            report.findings.push(text.hook(
                format!("system call {number} as well as {other}"),
                at,
                target,
            ));
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
        if instruction.op0_kind() != OpKind::NearBranch64
            || own.contains(&instruction.near_branch_target())
        {
            continue;
        }
        report.examined += 1;
        if !text.has(instruction.near_branch_target()) {
            let entry = format!("branch of {DISPATCHER} at +{:#x}", instruction.ip() - start);
            report.findings.push(text.hook(
                entry,
                instruction.ip(),
                instruction.near_branch_target(),
            ));
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
    let has_names = kernel.symbol(KNOWN_GATE).is_ok();
    let mut vectors = HashMap::new();
    let mut report = Report::default();
    for vector in 0..GATES {
        let at = vector * GATE_LEN;
        if bytes.u8(at + PRESENT_AT) & PRESENT == 0 {
            continue;
        }
        report.examined += 1;
        let low = u64::from(bytes.u16(at)) | u64::from(bytes.u16(at + 6)) << 16;
        let target = low | u64::from(bytes.u32(at + 8)) << 32;
        let is_early =
            |start: u64| EARLY_LENS.iter().any(|len| start.wrapping_add(vector * len) == target);
        let is_exception = vector < EXCEPTIONS;
        if is_exception && early.is_some_and(is_early) {
            continue;
        }
        let is_stub = || {
            let nearest = kernel.symbols().ok()?.nearest(target)?;
            Some(!is_exception && STUBS.contains(&nearest.name.as_str()))
        };
        let is_fine = match has_names {
            true => {
                let is_gate = |name: &str| GATE_NAMES.iter().any(|begin| name.starts_with(begin));
                text.begins(target)? && text.is_named(target, is_gate)?
                    || text.has(target) && is_stub() == Some(true)
            }
            false if is_exception => text.begins(target)?,
            false => text.has(target),
        };
        let entry = match vectors.insert(target, vector).filter(|_| has_names) {
            _ if !is_fine => format!("interrupt vector {vector}"),
            Some(other) => format!("interrupt vector {vector} as well as {other}"),
            None => continue,
        };
        report.findings.push(text.hook(entry, start + at, target));
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
