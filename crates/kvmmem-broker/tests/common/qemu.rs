// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The stock QEMU of this machine, without hardware virtualisation: its firmware is guest enough.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvmmem_client::ClientError;
use kvmmem_client::admin::{NewTarget, Which};
use kvmmem_qemu::discover::{HostVm, discover};
use serde_json::{Value, json};

use super::TestBroker;

/// How long QEMU may take to start, and its firmware to leave its tables.
pub(crate) const FIRMWARE: Duration = Duration::from_secs(60);

/// A QEMU, killed on drop. It has a monitor for the broker, and one for the test.
pub(crate) struct Qemu {
    pub(crate) process: Child,
    name: String,
    pub(crate) qmp: PathBuf,
    pub(crate) monitor: PathBuf,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_file(&self.qmp);
        let _ = std::fs::remove_file(&self.monitor);
    }
}

impl Qemu {
    /// Starts a VM whose monitors answer; `None` where this machine has no QEMU.
    pub(crate) fn start(broker: &TestBroker, name: &str, arguments: &[&str]) -> Option<Self> {
        let qemu = Self::spawn(broker, name, arguments)?;
        wait_long("QEMU to listen", || listens(&qemu.qmp) && listens(&qemu.monitor));
        // It listens before it has made its machine, and answers after that.
        drop(qemu.monitor());
        Some(qemu)
    }

    /// The same, without waiting for its monitors.
    pub(crate) fn spawn(broker: &TestBroker, name: &str, arguments: &[&str]) -> Option<Self> {
        let [qmp, monitor] =
            ["qmp", "monitor"].map(|kind| broker.directory.path().join(format!("{name}.{kind}")));
        let started = Command::new("qemu-system-x86_64")
            .args(all_arguments(name, &monitor, &qmp, arguments))
            .stdin(Stdio::null())
            .spawn();
        match started {
            Ok(process) => Some(Self { process, name: name.to_owned(), qmp, monitor }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                eprintln!("skipped: no qemu-system-x86_64: install it (Debian: qemu-system-x86)");
                None
            }
            Err(error) => panic!("cannot start QEMU: {error}"),
        }
    }

    /// Starts a VM whose RAM is one memfd.
    pub(crate) fn shared(
        broker: &TestBroker,
        name: &str,
        machine: &str,
        size: &str,
    ) -> Option<Self> {
        let backend = format!("memory-backend-memfd,id=ram0,size={size},share=on");
        let machine = format!("{machine},memory-backend=ram0");
        Self::start(broker, name, &["-m", size, "-object", &backend, "-machine", &machine])
    }

    /// All arguments that it would be started with, besides these.
    pub(crate) fn arguments(&self, arguments: &[&str]) -> Vec<String> {
        all_arguments(&self.name, &self.monitor, &self.qmp, arguments)
    }

    /// What `host discover` says of it.
    pub(crate) fn found(&self) -> HostVm {
        discover().unwrap().into_iter().find(|found| found.pid == self.process.id()).unwrap()
    }

    pub(crate) fn pid(&self) -> Which {
        Which::Pid(self.process.id())
    }

    pub(crate) fn socket(&self) -> Which {
        Which::Qmp { socket: self.qmp.clone(), pid: None }
    }

    /// The test's own monitor. A QEMU that is about to replace itself may still let a client
    /// connect.
    pub(crate) fn monitor(&self) -> Monitor {
        let began = Instant::now();
        loop {
            if let Some(monitor) = Monitor::connect(&self.monitor) {
                return monitor;
            }
            assert!(began.elapsed() < FIRMWARE, "QEMU's monitor does not answer");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

/// Whether a socket is listened at: it is there a moment before that.
pub(crate) fn listens(path: &Path) -> bool {
    let sockets = std::fs::read_to_string("/proc/net/unix").unwrap();
    // Number, references, protocol, flags (of which this one says that it listens), type, state,
    // inode, path.
    let is_it = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        words.get(3) == Some(&"00010000")
            && words.get(7).is_some_and(|found| Path::new(found) == path)
    };
    sockets.lines().any(is_it)
}

fn all_arguments(name: &str, monitor: &Path, qmp: &Path, arguments: &[&str]) -> Vec<String> {
    let socket = |path: &Path| format!("unix:{},server=on,wait=off", path.display());
    let (guest, monitor, qmp) = (format!("guest={name}"), socket(monitor), socket(qmp));
    let first = ["-accel", "tcg", "-nodefaults", "-display", "none"];
    let own = ["-name", &guest, "-qmp", &monitor, "-qmp", &qmp];
    first.iter().chain(&own).chain(arguments).map(|word| (*word).to_owned()).collect()
}

/// A connection to QEMU's monitor. Events are dropped.
pub(crate) struct Monitor(BufReader<UnixStream>);

impl Monitor {
    fn connect(path: &Path) -> Option<Self> {
        let stream = UnixStream::connect(path).ok()?;
        stream.set_read_timeout(Some(FIRMWARE)).unwrap();
        let mut monitor = Self(BufReader::new(stream));
        let mut line = String::new();
        monitor.0.read_line(&mut line).ok().filter(|_| line.contains("QMP"))?;
        monitor.execute("qmp_capabilities", json!({}));
        Some(monitor)
    }

    #[track_caller]
    pub(crate) fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let mut request = json!({ "execute": command, "arguments": arguments }).to_string();
        request.push('\n');
        self.0.get_mut().write_all(request.as_bytes()).unwrap();
        loop {
            let message = self.receive();
            match message.get("return") {
                Some(answer) => return answer.clone(),
                None => assert!(message.get("event").is_some(), "{command}: {message}"),
            }
        }
    }

    /// Waits until the VM is in a state.
    pub(crate) fn wait_status(&mut self, status: &str) {
        let began = Instant::now();
        loop {
            let answer = self.execute("query-status", json!({}));
            if answer["status"] == status {
                return;
            }
            assert!(began.elapsed() < FIRMWARE, "still waiting for {status}: {answer}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Waits until QEMU closes it.
    pub(crate) fn wait_end(mut self) {
        let mut line = String::new();
        while self.0.read_line(&mut line).is_ok_and(|count| count > 0) {}
    }

    /// Makes QEMU end by itself.
    pub(crate) fn quit(mut self) {
        self.execute("quit", json!({}));
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }
}

/// Whether this machine's QEMU is of version `major` or later; says so where not.
pub(crate) fn has_qemu(major: u32) -> bool {
    let output = Command::new("qemu-system-x86_64").arg("--version").output();
    let text = output
        .map(|output| String::from_utf8_lossy(&output.stdout).into_owned())
        .unwrap_or_default();
    let version =
        text.split("version ").nth(1).and_then(|rest| rest.split('.').next()?.parse::<u32>().ok());
    let is_new_enough = version.is_some_and(|version| version >= major);
    if !is_new_enough {
        eprintln!(
            "skipped: qemu-system-x86_64 is {version:?}: install version {major} or later (Debian 13 has 10), first in PATH"
        );
    }
    is_new_enough
}

/// Waits for a QEMU, which may have to share the processor with much else.
pub(crate) fn wait_long(what: &str, holds: impl Fn() -> bool) {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < FIRMWARE, "still waiting: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

pub(crate) fn refusal(broker: &TestBroker, which: &Which) -> String {
    match broker.admin().add_target(which, None) {
        Err(ClientError::Refused { message, .. }) => message,
        other => panic!("{other:?}"),
    }
}

/// Adds a VM by the rules of its machine type, as soon as its firmware has run.
pub(crate) fn add_confirmed(broker: &TestBroker, qemu: &Qemu) -> NewTarget {
    let began = Instant::now();
    loop {
        match broker.admin().add_target(&qemu.pid(), None) {
            Err(ClientError::Refused { message, .. })
                // Until its firmware has run, and before that its memory is mapped.
                if ["not confirmed", "could be RAM"].iter().any(|words| message.contains(words))
                    && began.elapsed() < FIRMWARE =>
            {
                std::thread::sleep(Duration::from_millis(100));
            }
            added => return added.unwrap(),
        }
    }
}
