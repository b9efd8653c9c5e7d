// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask bench exits`: VM exits of each operation, which count the same on any machine.
//!
//! The tool in C makes many operations of a kind while the kernel's tracepoints of KVM count the
//! exits of the introspector's only vCPU by reason. Exits of timers and of idling are left out, and
//! what the start and the end of a series cost is subtracted.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};
use kvmmem_client::admin::GrantRequest;
use kvmmem_guest::Command;
use kvmmem_proto::scope::Rights;
use serde::{Deserialize, Serialize};

use crate::test_bed::TestBed;
use crate::wait::PATIENCE;
use crate::world::{BENCH, World};

/// Operations of a kind; at most as many as a machine has views.
const ROUNDS: u32 = 48;
/// Bytes of the target that are touched, from [`FROM`] on: RAM that its kernel has used.
const LENGTH: u64 = 8 << 20;
const FROM: u64 = 16 << 20;

/// Where the kernel mounts tracefs by itself.
const TRACEFS: &str = "/sys/kernel/debug/tracing";

/// Operations of one kind and their exits.
#[derive(Serialize)]
pub(super) struct Counts {
    name: String,
    operations: u32,
    /// By hypercall.
    hypercalls: u64,
    /// For memory: KVM fills its page tables, or emulates an access.
    memory: u64,
    /// Others of the guest's instructions: ports, MSRs, CPUID.
    instructions: u64,
    /// Returns to the VMM, by any exit.
    vmm: u64,
}

/// What the tool does next.
#[derive(Deserialize)]
struct Phase {
    phase: String,
    operations: u32,
}

pub(super) fn counts() -> Result<Vec<Counts>> {
    let mut world = World::start(TestBed::from_env()?)?;
    let marker = world.marker()?;
    marker.child.kill(9)?;
    marker.child.wait(PATIENCE)?;
    let grant = world.grant_as(|usual| GrantRequest {
        rights: Rights::ReadWrite,
        uses: 2 * ROUNDS,
        ttl_ms: 3_600_000,
        ..usual
    })?;
    let bench = std::fs::read(world.bed.bin("kvmmem-bench")).context("no bench in the bed")?;
    let agent = world.agent()?;
    agent.put(BENCH, 0o755, &bench)?;
    let numbers = [FROM, LENGTH, ROUNDS.into()].map(|number| number.to_string());
    let words = grant.token.words().map(|word| format!("{word:#x}"));
    let command = Command::new(BENCH).as_member().memlock(64 << 20).arg("exits");
    let mut child = agent.spawn(&command.args(numbers).args(words))?;
    let counters = Counters::start(vcpu_of(world.introspector()?.process.id())?)?;

    let mut rows: Vec<Counts> = Vec::new();
    let mut before: Option<(Phase, [u64; 4])> = None;
    loop {
        let Some(line) = child.read_line(PATIENCE)? else {
            bail!("the bench ended: {}", child.take_stderr());
        };
        let next: Phase =
            serde_json::from_str(&line).with_context(|| format!("the bench says {line:?}"))?;
        let now = counters.read()?;
        if let Some((done, then)) = before.take() {
            let of = |index: usize| Some(now.get(index)?.saturating_sub(*then.get(index)?));
            let [hypercalls, memory, instructions, vmm] =
                [0, 1, 2, 3].map(|index| of(index).unwrap_or_default());
            let Phase { phase: name, operations } = done;
            rows.push(Counts { name, operations, hypercalls, memory, instructions, vmm });
        }
        if next.operations == 0 {
            break;
        }
        let is_revocation = next.phase == "view: revoke";
        before = Some((next, counters.read()?));
        child.write_stdin(b"\n")?;
        if is_revocation {
            world.revoke(grant.grant)?;
        }
    }
    child.write_stdin(b"\n")?;
    ensure!(child.wait(PATIENCE)?.success(), "the bench failed: {}", child.take_stderr());
    ensure!(!rows.is_empty(), "the bench did nothing");
    let nothing = rows.remove(0);
    for row in &mut rows {
        row.hypercalls = row.hypercalls.saturating_sub(nothing.hypercalls);
        row.memory = row.memory.saturating_sub(nothing.memory);
        row.instructions = row.instructions.saturating_sub(nothing.instructions);
        row.vmm = row.vmm.saturating_sub(nothing.vmm);
    }
    Ok(rows)
}

/// Prints the table, or one JSON object a line.
pub(super) fn print(rows: &[Counts], is_json: bool) -> Result<()> {
    if is_json {
        for row in rows {
            println!("{}", serde_json::to_string(row)?);
        }
        return Ok(());
    }
    println!(
        "{:<30} {:>10} {:>11} {:>8} {:>13} {:>8}",
        "VM exits of an operation", "operations", "hypercalls", "memory", "instructions", "to VMM"
    );
    for row in rows {
        let each = |count: u64| -> Result<f64> {
            Ok(f64::from(u32::try_from(count)?) / f64::from(row.operations))
        };
        println!(
            "{:<30} {:>10} {:>11.3} {:>8.3} {:>13.3} {:>8.3}",
            row.name,
            row.operations,
            each(row.hypercalls)?,
            each(row.memory)?,
            each(row.instructions)?,
            each(row.vmm)?
        );
    }
    Ok(())
}

/// Thread of a VMM's first vCPU.
fn vcpu_of(pid: u32) -> Result<u32> {
    for task in std::fs::read_dir(format!("/proc/{pid}/task")).context("no threads")? {
        let task = task?;
        if std::fs::read_to_string(task.path().join("comm"))?.trim() == "vcpu0" {
            return task.file_name().to_string_lossy().parse().context("a thread's name");
        }
    }
    bail!("process {pid} has no vCPU")
}

/// Histograms of a vCPU's exits, and of those that return to the VMM. Gone when dropped.
struct Counters([(PathBuf, String); 2]);

impl Counters {
    fn start(vcpu: u32) -> Result<Self> {
        let trigger = |event: &str, key: &str| {
            let path = PathBuf::from(format!("{TRACEFS}/events/kvm/{event}"));
            (path, format!("hist:keys={key} if common_pid=={vcpu}"))
        };
        let keys =
            [trigger("kvm_exit", "exit_reason,isa"), trigger("kvm_userspace_exit", "reason")];
        let this = Self(keys);
        for (path, trigger) in &this.0 {
            std::fs::write(path.join("trigger"), trigger).with_context(|| {
                format!(
                    "cannot count {}: the kernel must have CONFIG_HIST_TRIGGERS",
                    path.display()
                )
            })?;
        }
        Ok(this)
    }

    /// Exits by hypercall, for memory, of other instructions; returns to the VMM.
    fn read(&self) -> Result<[u64; 4]> {
        let [(exits, _), (returns, _)] = &self.0;
        let mut counts = [0; 4];
        for (keys, count) in histogram(&std::fs::read_to_string(exits.join("hist"))?)? {
            let key = |name| keys.get(name).copied().unwrap_or_default();
            match kind(key("exit_reason"), key("isa") == ISA_SVM) {
                Kind::Hypercall => counts[0] += count,
                Kind::Memory => counts[1] += count,
                Kind::Instruction => counts[2] += count,
                Kind::Background => {}
            }
        }
        for (keys, count) in histogram(&std::fs::read_to_string(returns.join("hist"))?)? {
            // Signals interrupt the guest when it is paused.
            const KVM_EXIT_INTR: u64 = 10;
            if keys.get("reason") != Some(&KVM_EXIT_INTR) {
                counts[3] += count;
            }
        }
        Ok(counts)
    }
}

impl Drop for Counters {
    fn drop(&mut self) {
        for (path, trigger) in &self.0 {
            let _ = std::fs::write(path.join("trigger"), format!("!{trigger}"));
        }
    }
}

const ISA_SVM: u64 = 2;

enum Kind {
    Hypercall,
    Memory,
    Instruction,
    /// Interrupts, timers, idling.
    Background,
}

/// The kind of an exit, by its reason (arch/x86/include/uapi/asm/svm.h and vmx.h).
fn kind(reason: u64, is_svm: bool) -> Kind {
    match (is_svm, reason) {
        (true, 0x81) | (false, 18) => Kind::Hypercall,
        (true, 0x400) | (false, 48 | 49) => Kind::Memory,
        (true, 0x60..=0x64 | 0x77 | 0x78 | 0x7c) => Kind::Background,
        (false, 1 | 7 | 12 | 32 | 40 | 52) => Kind::Background,
        _ => Kind::Instruction,
    }
}

/// The entries of a histogram: lines such as `{ exit_reason: 129, isa: 2 } hitcount: 7`.
fn histogram(text: &str) -> Result<Vec<(BTreeMap<String, u64>, u64)>> {
    let mut entries = Vec::new();
    for line in text.lines().filter(|line| line.starts_with('{')) {
        let context = || format!("not an entry of a histogram: {line:?}");
        let (keys, count) =
            line.trim_start_matches('{').split_once("} hitcount:").with_context(context)?;
        let keys = keys.split(',').map(|key| {
            let (name, value) = key.split_once(':').with_context(context)?;
            Ok((name.trim().to_owned(), value.trim().parse().with_context(context)?))
        });
        entries.push((keys.collect::<Result<_>>()?, count.trim().parse().with_context(context)?));
    }
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_read() {
        let text = "# event histogram\n#\n\n{ exit_reason:        129, isa:          2 } hitcount:          7\n\nTotals:\n";
        let [(keys, 7)] = &histogram(text).unwrap()[..] else { panic!() };
        assert_eq!((keys["exit_reason"], keys["isa"]), (129, 2));
        assert!(histogram("{ a: b } hitcount: 1").is_err());
    }
}
