// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which kernel runs in a guest that is paused: its RAM has two, and a vCPU of this machine's QEMU
//! decides.

mod common;
#[path = "../../kvmmem-linux/tests/common/mod.rs"]
mod guest;

use std::fs::{File, read_dir, read_link};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use common::finish;
use common::qemu::{Qemu, wait_status};
use guest::{Guest, PAGE_TABLES, Place, RAM};

/// Where the kernels begin: below, the firmware has its tables.
const KERNELS: usize = 4 << 20;

/// A boot sector that turns paging on with this CR3. What it runs in is not mapped there, so that
/// the vCPU shuts down.
fn boot_sector(cr3: u64) -> Vec<u8> {
    let eax = |value: u32| [&[0x66, 0xb8][..], &value.to_le_bytes()].concat();
    let code = [
        &[0xfa][..],
        // CR3; CR4.PAE; EFER.LME; CR0.PG and PE.
        &eax(u32::try_from(cr3).unwrap()),
        &[0x0f, 0x22, 0xd8],
        &eax(0x20),
        &[0x0f, 0x22, 0xe0],
        &[0x66, 0xb9, 0x80, 0x00, 0x00, 0xc0],
        &eax(0x100),
        &[0x66, 0x31, 0xd2],
        &[0x0f, 0x30],
        &eax(0x8000_0001),
        &[0x0f, 0x22, 0xc0],
    ];
    let mut sector = code.concat();
    sector.resize(510, 0xf4);
    sector.extend([0x55, 0xaa]);
    sector
}

/// The RAM of a QEMU, which has it in a memfd.
fn ram(qemu: &Qemu) -> File {
    let folder = format!("/proc/{}/fd", qemu.0.id());
    let mut files = read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let is_ram = |path: &std::path::PathBuf| {
        read_link(path).is_ok_and(|to| to.to_string_lossy().contains("memory-backend-memfd"))
    };
    File::options().write(true).open(files.find(is_ram).unwrap()).unwrap()
}

#[test]
fn of_a_paused_guest_a_vcpu_tells_which_kernel_runs() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: a broker of the command's own needs root: run the tests as root");
        return;
    }
    let kernels = Guest::with(&[Place::FIRST, Place::SECOND]).bytes(KERNELS as u64, RAM - KERNELS);
    for place in [Place::FIRST, Place::SECOND] {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let name = format!("paused-{}-{:x}", std::process::id(), place.gpa);
        std::fs::write(path("disk"), boot_sector(place.gpa + PAGE_TABLES)).unwrap();
        let disk = format!("file={},format=raw,if=ide", path("disk").display());
        let socket = |name: &str| format!("unix:{},server=on,wait=off", path(name).display());
        let (own, last) = (socket("monitor"), socket("qmp"));
        let options = [
            "-m",
            "64",
            "-no-reboot",
            "-no-shutdown",
            "-drive",
            &disk,
            "-qmp",
            &own,
            "-qmp",
            &last,
        ];
        let Some(qemu) = Qemu::start(&name, &options) else { return };
        wait_status(&path("monitor"), "shutdown");
        ram(&qemu).write_all_at(&kernels, KERNELS as u64).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmem"));
        command.args(["info", "--json", "--target", &name]);
        command.env("KVMMEM_BROKER", path("none")).env_remove("RUST_LOG");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let ended = finish(command.spawn().unwrap());
        let info: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap_or_default();
        let cr3 = format!("{:#x}", place.gpa + PAGE_TABLES);
        assert_eq!(info["cr3"].as_str(), Some(cr3.as_str()), "{}", ended.stderr);
    }
}
