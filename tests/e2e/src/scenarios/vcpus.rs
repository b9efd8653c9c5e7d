// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Registers and pauses of a VM of `kvmmem vm`.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use kvmmem_client::admin::Admin;
use kvmmem_guest::Command;
use serde_json::Value;

use crate::report::Report;
use crate::wait::PATIENCE;
use crate::world::{PROBE, TARGET, World};

/// How often a pause is repeated: the broker ends it after 10 s.
const REPEAT: Duration = Duration::from_secs(1);

pub(crate) fn vcpus(world: &mut World, report: &mut Report) -> Result<()> {
    let directory = tempfile::tempdir().context("no place for a dump")?;
    let path = |name: &str| directory.path().join(name).to_string_lossy().into_owned();
    let core = path("core");
    let dump = ["dump", &core, "--target", TARGET, "--format", "elf", "--pause", "--json"];
    let record: Value =
        serde_json::from_str(&world.kvmmem(&dump)?).context("dump prints no JSON")?;
    let registers = &record["registers"];
    let is_there = registers["vcpus"] == 1 && registers["source"] == "kvmmem-vmm";
    report.check("an ELF dump has the vCPU's registers", is_there, registers);
    let was_running = record["pause"]["was_running"] == true;
    report.check("the target was paused for it", was_running, &record["pause"]);
    report.check("and runs again", runs(world), "");

    let vcpus = world.admin()?.registers(TARGET)?;
    let [vcpu] = &vcpus[..] else { return Err(anyhow!("there are {} vCPUs", vcpus.len())) };
    let lstar = format!("{:#x}", vcpu.lstar.context("there is no MSR_LSTAR")?);
    let broker = world.socket().to_string_lossy().into_owned();
    // The tables of a process may have pages of another size there.
    let by = |words: &[&str]| -> Result<Value> {
        // A file takes no broker, which World::kvmmem gives.
        let mut command = std::process::Command::new(world.bed.bin("kvmmem"));
        let output = command.args(["translate", "--json"]).args(words).arg(&lstar).output()?;
        let mut row: Value =
            serde_json::from_slice(&output.stdout).context("translate prints no JSON")?;
        Ok(row["gpa"].take())
    };
    let kernel = by(&["--target", TARGET, "--broker", &broker, "--cr3", "kernel"])?;
    report.check("the kernel has MSR_LSTAR's address", kernel.is_string(), &kernel);
    let (dumped, now) = (
        by(&["--file", &core, "--vcpu", "0"])?,
        by(&["--target", TARGET, "--broker", &broker, "--vcpu", "0"])?,
    );
    report.equal("CR3 in the dump leads where the kernel's does", &dumped, &kernel);
    report.equal("so does the vCPU's CR3 now", &now, &kernel);

    let checks = world.try_kvmmem(&["check", "--target", TARGET, "--json"])?;
    let mut rows = checks
        .stdout
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice::<Value>(line).ok());
    let row = rows.find(|row| row["check"] == "lstar").context("check has no row for MSR_LSTAR")?;
    report.check(
        "MSR_LSTAR leads to the kernel's entry",
        row["examined"] == 1 && row["found"] == 0,
        &row,
    );

    paused(world, report, directory.path())?;
    // A client that ends, and a broker that is killed, leave nothing paused.
    let mut admin = world.admin()?;
    admin.pause(TARGET)?;
    drop(admin);
    report.check("the target runs when the client that paused it has ended", runs(world), "");
    let mut admin = world.admin()?;
    admin.pause(TARGET)?;
    world.restart_broker()?;
    report.check("and when the broker was killed", runs(world), "");
    drop(admin);
    report.check("its VM is registered again", world.wait_for_vms(2)?, "");
    Ok(())
}

/// Memory of a target that is paused does not change, and that of one that runs does.
fn paused(world: &World, report: &mut Report, directory: &Path) -> Result<()> {
    let mut admin = world.admin()?;
    admin.pause(TARGET)?;
    let done = AtomicBool::new(false);
    let (first, second) = std::thread::scope(|scope| {
        let keeper = scope.spawn(|| keep(&mut admin, &done));
        let digests =
            digest(world, directory).and_then(|first| Ok((first, digest(world, directory)?)));
        done.store(true, Ordering::Relaxed);
        keeper.join().map_err(|_| anyhow!("the keeper of the pause has panicked"))??;
        digests
    })?;
    report.equal("paused memory does not change", &second, &first);
    admin.resume(TARGET)?;
    report.check("a target that is resumed runs", runs(world), "");
    report.check("and its memory changes", digest(world, directory)? != first, "");
    Ok(())
}

/// Repeats the pause until it is over.
fn keep(admin: &mut Admin, done: &AtomicBool) -> Result<()> {
    while !done.load(Ordering::Relaxed) {
        admin.pause(TARGET)?;
        std::thread::sleep(REPEAT);
    }
    Ok(())
}

/// SHA-256 of the target's memory.
fn digest(world: &World, directory: &Path) -> Result<String> {
    let file = directory.join("raw");
    let name = file.to_string_lossy();
    let record: Value =
        serde_json::from_str(&world.kvmmem(&["dump", &name, "--target", TARGET, "--json"])?)?;
    for name in ["raw", "raw.json"] {
        std::fs::remove_file(directory.join(name)).context("cannot remove a dump")?;
    }
    record["sha256"].as_str().map(str::to_owned).context("the record has no digest")
}

/// Whether the guest runs a program.
fn runs(world: &World) -> bool {
    let command = Command::new(PROBE).arg("--help");
    let ran = world.target().map(|target| target.agent.run(&command, PATIENCE));
    ran.is_ok_and(|ran| ran.is_ok())
}
