// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The stock QEMU of this machine, without hardware virtualisation: its firmware is guest enough.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

/// A QEMU with 64 MiB; killed on drop.
pub(crate) struct Qemu(pub(crate) Child);

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Qemu {
    /// Starts a VM of this name; `None` where this machine has no QEMU.
    pub(crate) fn start(name: &str, more: &[&str]) -> Option<Self> {
        const RAM: &str = "memory-backend-memfd,id=ram0,size=64M,share=on";
        let started = Command::new("qemu-system-x86_64")
            .args(["-accel", "tcg", "-nodefaults", "-display", "none", "-name", name])
            .args(["-object", RAM, "-machine", "pc,memory-backend=ram0"])
            .args(more)
            .stdin(Stdio::null())
            .spawn();
        match started {
            Ok(process) => Some(Self(process)),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("skipped: no qemu-system-x86_64: install it (Debian: qemu-system-x86)");
                None
            }
            Err(error) => panic!("cannot start QEMU: {error}"),
        }
    }
}

/// The state that a QEMU is in, by a monitor of the test's own.
pub(crate) fn status(monitor: &Path) -> Option<String> {
    let mut stream = UnixStream::connect(monitor).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(60))).ok()?;
    stream
        .write_all(b"{\"execute\":\"qmp_capabilities\"}\n{\"execute\":\"query-status\"}\n")
        .ok()?;
    let lines = BufReader::new(stream).lines().map_while(Result::ok);
    let mut answers = lines.filter_map(|line| serde_json::from_str::<Value>(&line).ok());
    answers.find_map(|answer| Some(answer["return"]["status"].as_str()?.to_owned()))
}

pub(crate) fn wait_status(monitor: &Path, wanted: &str) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while status(monitor).as_deref() != Some(wanted) {
        assert!(Instant::now() < deadline, "still waiting for {wanted}: {:?}", status(monitor));
        std::thread::sleep(Duration::from_millis(20));
    }
}
