// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A fake QEMU, for tests of what pauses VMs: it runs or is stopped, and fails as it is told.

use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};

/// How long a test waits for what must happen.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What goes wrong, at the next command of that name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    Refuse,
    Close,
    /// It is carried out, and the connection ends before that is said.
    CloseAfter,
    Silence,
    Garbage,
}

#[derive(Debug)]
pub(crate) struct Machine {
    pub(crate) status: &'static str,
    pub(crate) fault: Option<(&'static str, Fault)>,
    pub(crate) registers: String,
    pub(crate) vcpus: Value,
    /// The commands that have come, without questions.
    pub(crate) commands: Vec<String>,
    /// Goes with the first byte of the next answer, which is sent with these flags.
    pub(crate) file: Option<(OwnedFd, SendFlags)>,
    /// Whether the socket alone has it.
    pub(crate) has_sent_file: bool,
}

/// One; its threads end with the test's process.
pub(crate) struct Fake {
    machine: Arc<Mutex<Machine>>,
    pub(crate) path: PathBuf,
    _directory: tempfile::TempDir,
}

impl Fake {
    pub(crate) fn start(status: &'static str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp");
        let listener = UnixListener::bind(&path).unwrap();
        let machine = Machine {
            status,
            fault: None,
            registers: String::new(),
            vcpus: json!([{ "cpu-index": 0 }]),
            commands: vec![],
            file: None,
            has_sent_file: false,
        };
        let machine = Arc::new(Mutex::new(machine));
        let served = Arc::clone(&machine);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                // One client at a time, as QEMU does it.
                let _ = serve(&served, &stream.unwrap());
            }
        });
        Self { machine, path, _directory: directory }
    }

    pub(crate) fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap()
    }

    #[track_caller]
    pub(crate) fn wait(&self, status: &str) {
        let began = Instant::now();
        while self.machine().status != status {
            assert!(began.elapsed() < PATIENCE, "still waiting for {status}: {:?}", self.machine());
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

fn serve(shared: &Mutex<Machine>, stream: &UnixStream) -> std::io::Result<()> {
    let mut writer = stream;
    let mut send = |value: Value| writer.write_all(format!("{value}\n").as_bytes());
    send(json!({ "QMP": {} }))?;
    for line in BufReader::new(stream).lines() {
        let request: Value = serde_json::from_str(&line?).unwrap();
        let command = request["execute"].as_str().unwrap();
        let mut machine = shared.lock().unwrap();
        let fault = machine.fault.take_if(|(at, _)| *at == command).map(|(_, fault)| fault);
        match fault {
            Some(Fault::Refuse) => {
                send(json!({ "error": { "desc": "no" }, "id": request["id"] }))?;
                continue;
            }
            Some(Fault::Close) => break,
            Some(Fault::Silence) => continue,
            Some(Fault::Garbage) => {
                send(json!([]))?;
                continue;
            }
            Some(Fault::CloseAfter) | None => {}
        }
        let answer = match command {
            "stop" | "cont" => {
                machine.status = if command == "stop" { "paused" } else { "running" };
                machine.commands.push(command.to_owned());
                json!({})
            }
            "query-status" => json!({ "status": machine.status }),
            "query-memory-size-summary" => json!({ "base-memory": 1 }),
            "query-cpus-fast" => machine.vcpus.clone(),
            "human-monitor-command" => json!(machine.registers),
            _ => json!({}),
        };
        let file = machine.file.take();
        drop(machine);
        if fault == Some(Fault::CloseAfter) {
            break;
        }
        if let Some((file, flags)) = file {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            let files = [file.as_fd()];
            assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
            sendmsg(stream, &[IoSlice::new(b"{")], &mut control, flags)?;
            (&*stream).write_all(b"\"return\": {}}\n")?;
            drop(file);
            shared.lock().unwrap().has_sent_file = true;
            continue;
        }
        match request.get("id") {
            Some(id) => send(json!({ "return": answer, "id": id }))?,
            None => send(json!({ "return": answer }))?,
        }
    }
    stream.shutdown(std::net::Shutdown::Both)
}
