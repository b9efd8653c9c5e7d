// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The guest whose core the tools open, and its vCPUs' registers as its QEMU shows them.

use std::collections::BTreeMap;
use std::fs;
use std::io::Read as _;
use std::path::Path;
use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use serde_json::json;

use crate::monitor::Monitor;
use crate::nested;
use crate::process::Process;
use crate::test_bed::TestBed;
use crate::tool::Tool;

/// How many vCPUs it has.
pub(super) const VCPUS: usize = 2;

/// Registers of one vCPU, by QEMU's names.
pub(super) type Registers = BTreeMap<String, u64>;

/// Offset of CR3 in the note that QEMU puts into its own cores: after a version, a size, 18
/// registers, 10 segments, CR0 to CR2.
const CR3_IN_NOTE: usize = 8 + 18 * 8 + 10 * 24 + 3 * 8;

/// Boots the guest, dumps its memory to `core` while it stands still, and returns what its vCPUs
/// have in their registers.
pub(super) fn dump(
    bed: &TestBed,
    folder: &Path,
    core: &Path,
    log: &Path,
) -> Result<Vec<Registers>> {
    let path = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let (serial, qmp, socket) = (path("serial"), path("qmp"), path("broker"));
    let monitor = folder.join("monitor");
    let listen = |path: &str| format!("unix:{path},server=on,wait=off");
    let ram = "memory-backend-memfd,id=ram,size=512M,share=on";
    let mut qemu = Command::new(nested::QEMU);
    qemu.args(["-accel", "tcg", "-cpu", "max", "-nodefaults", "-display", "none", "-m", "512M"])
        .args(["-smp", &VCPUS.to_string(), "-object", ram, "-machine", "q35,memory-backend=ram"])
        .args([
            "-name",
            "guest=tools",
            "-append",
            "console=ttyS0",
            "-serial",
            &format!("file:{serial}"),
        ])
        .args(["-qmp", &listen(&qmp), "-qmp", &listen(&path("monitor"))])
        .arg("-kernel")
        .arg(bed.kernel().image());
    let mut qemu = Process::start(&mut qemu, log)?;
    qemu.wait("the guest's kernel to stop", || {
        fs::read(&serial)
            .is_ok_and(|text| text.windows(20).any(|part| part == b"end Kernel panic - n"))
    })?;
    let mut monitor = Monitor::connect(&monitor)?;
    monitor.execute("stop", &json!({}))?;
    let registers = (0..VCPUS).map(|vcpu| monitor.registers(vcpu)).collect::<Result<_>>()?;
    let mut broker = Command::new(bed.program("kvmmemd"));
    let mut broker = Process::start(broker.args(["--socket", &socket]), log)?;
    let kvmmem = || Tool::new(bed.program("kvmmem"), log).env("KVMMEM_BROKER", &socket);
    broker.wait("the broker to listen", || kvmmem().args(["target", "list"]).run().is_ok())?;
    kvmmem().args(["target", "add", "--qmp", &qmp]).run()?;
    let record = kvmmem()
        .env("KVMMEM_DEVICE", "/nonexistent")
        .args(["dump", "--target", "tools", "--format", "elf", "--pause", "--json"])
        .arg(core)
        .output()?;
    let record: serde_json::Value =
        serde_json::from_str(&record).context("dump printed no record")?;
    let (found, release) = (&record["vmcoreinfo"]["release"], bed.kernel().release());
    ensure!(found == release, "the record tells of kernel {found}, and the guest has {release}");
    let vcpus = &record["registers"]["vcpus"];
    ensure!(vcpus == VCPUS, "the record tells of {vcpus} vCPUs, and the guest has {VCPUS}");
    Ok(registers)
}

/// A register that QEMU has shown.
pub(super) fn register(registers: &Registers, name: &str) -> Result<u64> {
    registers.get(name).copied().with_context(|| format!("QEMU shows no {name}"))
}

/// Whether the core's notes of QEMU's kind, which crash reads, have the vCPUs' page tables.
pub(super) fn has_page_tables(core: &Path, registers: &[Registers]) -> Result<()> {
    const NAME: &[u8] = b"QEMU\0\0\0\0";
    let mut head = Vec::new();
    fs::File::open(core)?.take(1 << 20).read_to_end(&mut head)?;
    let names = head.windows(NAME.len()).enumerate().filter(|(_, name)| *name == NAME);
    let word = |(at, name): (usize, &[u8])| {
        let at = at + name.len() + CR3_IN_NOTE;
        Some(u64::from_le_bytes(head.get(at..at + 8)?.try_into().ok()?))
    };
    let found: Vec<u64> = names.filter_map(word).collect();
    let expected =
        registers.iter().map(|registers| register(registers, "CR3")).collect::<Result<Vec<_>>>()?;
    ensure!(found == expected, "the notes have CR3 {found:x?}, and the vCPUs {expected:x?}");
    Ok(())
}
