// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A QEMU that is none: it knows what an introspector's is asked, keeps what it is told to plug in,
//! plays the guest's driver, and goes wrong at the command that a test chooses.

use std::collections::{BTreeMap, HashMap};
use std::io::{IoSliceMut, Write};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use kvmmem_abi::descriptor::SEEN_AT;
use kvmmem_client::admin::Which;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
use serde_json::{Value, json};

/// What goes wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    /// The command is refused.
    Refuse,
    /// It is not answered, and nothing after it.
    Silence,
    /// Something else than JSON is sent.
    Garbage,
    /// The connection ends instead.
    Close,
    /// It is carried out, and the connection ends before that is said.
    CloseAfter,
    /// More events come before it is answered than a command may have.
    Flood,
    /// Events that never end follow the answer, and the first answer over each later connection.
    FloodForEver,
    /// It is answered by something that no QEMU says.
    Nonsense,
    /// The VM is reset before it is answered.
    Reset,
    /// The process executes another program before it is answered.
    Exec,
}

/// What the fake has.
#[derive(Debug, Default)]
pub(crate) struct Machine {
    files: HashMap<u64, Arc<OwnedFd>>,
    pub(crate) objects: BTreeMap<String, Arc<OwnedFd>>,
    /// By id, with their addresses.
    pub(crate) devices: BTreeMap<String, String>,
    /// After how many commands what goes wrong.
    pub(crate) fault: Option<(usize, Fault)>,
    /// Whether the guest releases devices.
    pub(crate) is_stubborn: bool,
    /// Whether events come without end.
    is_flooding: bool,
    /// How many times more events were taken than a socket holds.
    pub(crate) floods: usize,
    /// The VM's name, as QEMU says it.
    pub(crate) name: String,
    /// How long each answer takes.
    pub(crate) delay: Duration,
    /// Its process executes another program when it reads a line.
    process: Option<(u32, ChildStdin)>,
    last_file: u64,
    /// How many commands have been carried out.
    pub(crate) asked: usize,
}

/// A fake, ended on drop.
pub(crate) struct FakeQemu {
    pub(crate) machine: Arc<Mutex<Machine>>,
    socket: PathBuf,
    /// What looks like the process.
    process: Child,
    _directory: tempfile::TempDir,
}

impl FakeQemu {
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("qmp");
        let listener = UnixListener::bind(&socket).unwrap();
        let program = directory.path().join("qemu-system-fake");
        super::install(&Path::new("/bin/sh").canonicalize().unwrap(), &program);
        let mut process = Command::new(program)
            .args(["-c", "read line; exec cat"])
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let input = process.stdin.take().map(|stdin| (process.id(), stdin));
        let machine = Arc::new(Mutex::new(Machine { process: input, ..Machine::default() }));
        let served = Arc::clone(&machine);
        // It ends with the test's process.
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                serve(&served, &stream);
                let _ = stream.shutdown(Shutdown::Both);
            }
        });
        Self { machine, socket, process, _directory: directory }
    }

    pub(crate) fn which(&self) -> Which {
        Which::Qmp { socket: self.socket.clone(), pid: Some(self.process.id()) }
    }

    pub(crate) fn machine(&self) -> MutexGuard<'_, Machine> {
        self.machine.lock().unwrap()
    }

    /// Whether the process has ended.
    pub(crate) fn has_ended(&mut self) -> bool {
        self.process.try_wait().unwrap().is_some()
    }

    pub(crate) fn is_empty(&self) -> bool {
        let machine = self.machine();
        machine.devices.is_empty() && machine.objects.is_empty()
    }
}

impl Drop for FakeQemu {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// Sends the same event until the client goes; answers get in between.
fn flood(stream: &Arc<Mutex<UnixStream>>, machine: &Arc<Mutex<Machine>>) {
    let (stream, machine) = (Arc::clone(stream), Arc::clone(machine));
    std::thread::spawn(move || {
        // Short ones: what the socket holds takes far longer to be read than to be written.
        let events = "{\"event\":\"X\"}\n".repeat(50_000);
        while stream.lock().unwrap().write_all(events.as_bytes()).is_ok() {
            machine.lock().unwrap().floods += 1;
        }
    });
}

/// Serves a client until it goes or something goes wrong.
fn serve(shared: &Arc<Mutex<Machine>>, stream: &UnixStream) {
    let writer = Arc::new(Mutex::new(stream.try_clone().unwrap()));
    let send = |value: &Value| {
        let _ = writer.lock().unwrap().write_all(format!("{value}\n").as_bytes());
    };
    send(&json!({ "QMP": { "version": {}, "capabilities": [] } }));
    let mut floods = false;
    let mut buffer = Vec::new();
    let mut received = Vec::new();
    loop {
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            let request: Value = serde_json::from_slice(&line).unwrap();
            let command = request["execute"].as_str().unwrap();
            let mut machine = shared.lock().unwrap();
            let fault = machine.take_fault();
            match fault {
                Some(Fault::Refuse) => {
                    let id = &request["id"];
                    send(&json!({ "error": { "class": "GenericError", "desc": "no" }, "id": id }));
                    continue;
                }
                Some(Fault::Silence) => {
                    drop(machine);
                    while receive(stream, &mut buffer, &mut received) {}
                    return;
                }
                Some(Fault::Garbage) => {
                    let mut stream = stream;
                    let _ = stream.write_all(b"\x00]]\n");
                    return;
                }
                Some(Fault::Close) => return,
                Some(Fault::Flood) => {
                    for _ in 0..10_000 {
                        send(&json!({ "event": "RTC_CHANGE", "data": { "offset": 1 } }));
                    }
                }
                Some(Fault::FloodForEver) => machine.is_flooding = true,
                Some(Fault::Nonsense) => {
                    send(&json!({ "return": [[], "?"], "event": 7 }));
                    return;
                }
                Some(Fault::Reset) => send(&json!({ "event": "RESET", "data": { "guest": true } })),
                Some(Fault::Exec) => machine.execute_another_program(),
                Some(Fault::CloseAfter) | None => {}
            }
            let (delay, is_flooding) = (machine.delay, machine.is_flooding);
            let (mut answer, deleted) =
                machine.carry_out(command, &request["arguments"], &mut received);
            answer["id"] = request["id"].clone();
            drop(machine);
            std::thread::sleep(delay);
            if fault == Some(Fault::CloseAfter) {
                return;
            }
            for device in deleted {
                send(
                    &json!({ "event": "DEVICE_DELETED", "data": { "device": device, "path": "/x" } }),
                );
            }
            send(&answer);
            if is_flooding && !floods {
                floods = true;
                flood(&writer, shared);
            }
        }
        if !receive(stream, &mut buffer, &mut received) {
            return;
        }
    }
}

fn receive(stream: &UnixStream, buffer: &mut Vec<u8>, files: &mut Vec<OwnedFd>) -> bool {
    let mut chunk = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut slices = [IoSliceMut::new(&mut chunk)];
    let received = rustix::net::recvmsg(stream, &mut slices, &mut control, RecvFlags::CMSG_CLOEXEC);
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            files.extend(rights);
        }
    }
    let count = received.map_or(0, |received| received.bytes);
    buffer.extend_from_slice(&chunk[..count]);
    count > 0
}

impl Machine {
    fn take_fault(&mut self) -> Option<Fault> {
        let (left, fault) = self.fault?;
        self.fault = left.checked_sub(1).map(|left| (left, fault));
        (left == 0).then_some(fault)
    }

    fn execute_another_program(&mut self) {
        let (pid, input) = self.process.as_mut().unwrap();
        input.write_all(b"\n").unwrap();
        let program = format!("/proc/{pid}/exe");
        super::wait_for("another program", || {
            !std::fs::read_link(&program).unwrap().ends_with("qemu-system-fake")
        });
    }

    /// The answer, and the devices that the guest releases.
    fn carry_out(
        &mut self,
        command: &str,
        arguments: &Value,
        received: &mut Vec<OwnedFd>,
    ) -> (Value, Vec<String>) {
        self.asked += 1;
        let text = |key: &str| arguments[key].as_str().unwrap_or_default().to_owned();
        let refuse = |words: String| json!({ "error": { "class": "GenericError", "desc": words } });
        let mut deleted = Vec::new();
        let answer = match command {
            "device-list-properties" | "qmp_capabilities" | "remove-fd" | "stop" => json!({}),
            "qom-list-properties" => json!([{ "name": "readonly" }, { "name": "offset" }]),
            "query-name" => json!({ "name": self.name }),
            "query-uuid" => json!({ "UUID": "00000000-0000-0000-0000-000000000000" }),
            "query-cpus-fast" => json!([{}]),
            "qom-list" => match text("path").as_str() {
                "/objects" => listed(self.objects.keys(), "child<memory-backend-file>"),
                "/machine/peripheral" => listed(self.devices.keys(), "child<ivshmem-plain>"),
                _ => json!([]),
            },
            "query-pci" => self.pci(),
            "add-fd" => {
                self.last_file += 1;
                self.files.insert(self.last_file, Arc::new(received.pop().unwrap()));
                json!({ "fdset-id": self.last_file, "fd": self.last_file })
            }
            "object-add" => {
                let number = text("mem-path").rsplit('/').next().unwrap().parse().unwrap();
                self.objects.insert(text("id"), Arc::clone(&self.files[&number]));
                json!({})
            }
            "object-del" if self.devices.contains_key(&text("id")) => {
                return (refuse("in use".into()), deleted);
            }
            "object-del" if self.objects.remove(&text("id")).is_none() => {
                return (refuse(format!("object '{}' not found", text("id"))), deleted);
            }
            "object-del" => json!({}),
            "device_add" => {
                let page = &self.objects[&text("memdev")];
                if text("addr").ends_with(".0") {
                    // The guest's driver, which claims to have seen all that comes.
                    rustix::io::pwrite(page, &u64::MAX.to_le_bytes(), SEEN_AT as u64).unwrap();
                }
                self.devices.insert(text("id"), text("addr"));
                json!({})
            }
            "device_del" => {
                let Some(address) = self.devices.get(&text("id")) else {
                    return (refuse(format!("Device '{}' not found", text("id"))), deleted);
                };
                let (slot, function) = address.split_once('.').unwrap();
                let (slot, is_first) = (format!("{slot}."), function == "0");
                let goes = |(id, address): (&String, &String)| {
                    (*id == text("id") || (is_first && address.starts_with(&slot)))
                        .then(|| id.clone())
                };
                if !self.is_stubborn {
                    deleted = self.devices.iter().filter_map(goes).collect();
                    self.devices.retain(|id, _| !deleted.contains(id));
                }
                json!({})
            }
            other => return (refuse(format!("The command {other} has not been found")), deleted),
        };
        (json!({ "return": answer }), deleted)
    }

    fn pci(&self) -> Value {
        let slot = |address: &String| {
            u64::from_str_radix(&address[2..address.find('.').unwrap()], 16).unwrap()
        };
        let plugged = self.devices.iter().map(|(id, address)| {
            json!({ "slot": slot(address), "qdev_id": id, "id": { "vendor": 0x1af4, "device": 0x1110 } })
        });
        let bridge =
            json!({ "slot": 0, "qdev_id": "", "id": { "vendor": 0x8086, "device": 0x1237 } });
        json!([{ "bus": 0, "devices": std::iter::once(bridge).chain(plugged).collect::<Vec<_>>() }])
    }
}

fn listed<'a>(names: impl Iterator<Item = &'a String>, kind: &str) -> Value {
    names.map(|name| json!({ "name": name, "type": kind })).collect()
}
