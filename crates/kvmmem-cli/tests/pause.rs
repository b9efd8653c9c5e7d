// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `dump --pause` without a broker, of a VM under this machine's QEMU.

mod common;

use std::fs::File;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::common::qemu::{Qemu, status, wait_status};
use crate::common::{Ended, finish, signal};

/// A VM with two vCPUs.
struct Target {
    directory: tempfile::TempDir,
    name: String,
    /// The test's own.
    monitor: PathBuf,
    _qemu: Qemu,
}

impl Target {
    /// Starts it; `None` where that is not possible here.
    fn start(name: &str) -> Option<Self> {
        if !rustix::process::geteuid().is_root() {
            eprintln!("skipped: a broker of the command's own needs root: run the tests as root");
            return None;
        }
        let directory = tempfile::tempdir().unwrap();
        let (name, monitor) =
            (format!("{name}-{}", std::process::id()), directory.path().join("monitor"));
        let socket = |path: &Path| format!("unix:{},server=on,wait=off", path.display());
        let (own, last) = (socket(&monitor), socket(&directory.path().join("qmp")));
        // The command takes the last one.
        let qemu = Qemu::start(&name, &["-m", "64", "-smp", "2", "-qmp", &own, "-qmp", &last])?;
        wait_status(&monitor, "running");
        Some(Self { directory, name, monitor, _qemu: qemu })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn dump(&self, file: &Path) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmem"));
        command
            .args(["--json", "dump", "--target", &self.name, "--pause", "--format", "elf"])
            .arg(file);
        command.env("KVMMEM_BROKER", self.path("none")).env_remove("RUST_LOG");
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// A dump that is under way, and the other end of its pipe, with a byte read: the VM is paused.
    fn begin(&self) -> (Child, File) {
        let fifo = self.path("fifo");
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let child = self.dump(&fifo).spawn().unwrap();
        let mut reader = File::open(&fifo).unwrap();
        reader.read_exact(&mut [0]).unwrap();
        assert_eq!(status(&self.monitor).as_deref(), Some("paused"));
        (child, reader)
    }

    /// Dumps it to a file, once the firmware has left the tables that locate the RAM.
    fn whole(&self) -> Ended {
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let ended = finish(self.dump(&self.path("core")).spawn().unwrap());
            if ended.code == Some(0) {
                return ended;
            }
            assert!(Instant::now() < deadline, "{}", ended.stderr);
        }
    }
}

#[test]
fn a_dump_pauses_its_target_and_has_the_registers() {
    let Some(target) = Target::start("paused") else { return };
    let ended = target.whole();
    assert_eq!(status(&target.monitor).as_deref(), Some("running"));
    let record: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(record["registers"], json!({"vcpus": 2, "source": "qmp", "reason": null}));
    assert_eq!(record["pause"]["was_running"], true);
    assert!(record["pause"]["ms"].is_u64(), "{record}");
    let core = std::fs::read(target.path("core")).unwrap();
    // Headers of 4 segments or more lie before the first vCPU's note.
    let at = usize::try_from(u64::from_le_bytes(core[72..80].try_into().unwrap())).unwrap();
    assert_eq!((&core[at + 12..at + 16], core[at]), (&b"CORE"[..], 5));
}

#[test]
fn a_target_runs_again_after_its_dump_was_killed() {
    let Some(target) = Target::start("killed") else { return };
    let (mut killed, _reader) = target.begin();
    killed.kill().unwrap();
    killed.wait().unwrap();
    wait_status(&target.monitor, "running");
    // Nothing of it keeps the next one from QEMU's monitor.
    target.whole();
}

#[test]
fn a_target_runs_again_after_the_first_signal_to_a_dump_whose_pipe_is_not_read() {
    let Some(target) = Target::start("signalled") else { return };
    let (child, _reader) = target.begin();
    signal(&child, Signal::TERM);
    let ended = finish(child);
    assert_eq!(
        (ended.code, ended.stderr.contains("interrupted")),
        (Some(1), true),
        "{}",
        ended.stderr
    );
    assert_eq!(status(&target.monitor).as_deref(), Some("running"));
}

#[test]
fn a_target_runs_again_while_its_dump_is_stopped_which_fails_then() {
    let Some(target) = Target::start("stopped") else { return };
    let (child, mut reader) = target.begin();
    signal(&child, Signal::STOP);
    wait_status(&target.monitor, "running");
    signal(&child, Signal::CONT);
    std::io::copy(&mut reader, &mut std::io::sink()).unwrap();
    let ended = finish(child);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    let is_told = ["the target runs again before", "the target was not paused to the end"]
        .iter()
        .any(|words| ended.stderr.contains(words));
    assert!(is_told, "{}", ended.stderr);
    assert_eq!(status(&target.monitor).as_deref(), Some("running"));
}

#[test]
fn a_monitor_that_another_client_uses_is_told() {
    let Some(target) = Target::start("busy") else { return };
    let _other = UnixStream::connect(target.path("qmp")).unwrap();
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        let ended = finish(target.dump(&target.path("core")).spawn().unwrap());
        assert_eq!(ended.code, Some(1));
        // The firmware needs a while to leave the tables that locate the RAM. The audit log comes
        // before the error.
        let error = ended.stderr.lines().last().unwrap();
        if error.contains("cannot pause the target") {
            assert!(error.contains("/qmp in time; is another client connected to it"), "{error}");
            // That is the remedy for a target without a monitor.
            assert!(!error.contains("target add"), "{error}");
            return;
        }
        assert!(Instant::now() < deadline, "{}", ended.stderr);
    }
}

#[test]
fn a_vcpu_without_page_tables_or_that_is_not_there_is_named() {
    let Some(target) = Target::start("vcpu") else { return };
    // Firmware does without page tables.
    for (number, words) in [("1", "paging is off"), ("2", "there is no vCPU 2: the last one is 1")]
    {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmem"));
        command
            .args(["read", "--target", &target.name, "--vcpu", number, "0", "16"])
            .env_remove("RUST_LOG");
        command.env("KVMMEM_BROKER", target.path("none"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        // Until the firmware has left the tables that locate the RAM.
        let deadline = Instant::now() + Duration::from_secs(60);
        loop {
            let ended = finish(command.spawn().unwrap());
            assert_eq!(ended.code, Some(1), "{}", ended.stderr);
            if ended.stderr.contains(words) {
                break;
            }
            assert!(Instant::now() < deadline, "{}", ended.stderr);
        }
    }
}
