// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Monitors that lie, send_garbage, hang, and are handed on.

use std::io::{BufRead, BufReader, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvmmem::host::{HostEvent, HostLink};
use kvmmem_client::admin::{Admin, Evidence, GrantRequest, Rights, Which};
use serde_json::{Value, json};

use crate::common::{self, TestBroker, request, wait_for};
use crate::fake::{self, Fake, HONEST, SIZE, refusal};

#[test]
fn a_qemu_that_falls_silent_or_sends_garbage_keeps_its_target_and_delays_no_other() {
    let broker = TestBroker::start();
    let fake = Fake::start("sealed", HONEST);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("garbage.qmp");
    let honest = qmp(directory.path(), &fake, |_, answer| answer);
    let listener = UnixListener::bind(&path).unwrap();
    // Between the broker and a QEMU: what comes back is passed on until it is added, and garbage
    // from then on.
    let (send_garbage, garbage_lines) = channel::<&'static str>();
    let (left, is_left) = channel::<()>();
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut server = UnixStream::connect(honest).unwrap();
        let (mut from_client, mut to_server) =
            (client.try_clone().unwrap(), server.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut from_client, &mut to_server));
        let mut to_client = client.try_clone().unwrap();
        std::thread::spawn(move || std::io::copy(&mut server, &mut to_client));
        for garbage in garbage_lines {
            for _ in 0..1000 {
                if client.write_all(garbage.as_bytes()).is_err() {
                    return;
                }
            }
        }
        // Until the broker has had enough.
        while client.write_all(b"garbage \0 {{{\n").is_ok() {}
        drop(left);
    });
    let which = Which::Qmp { socket: path, pid: Some(fake.pid()) };
    broker.admin().add_target(&which, None).unwrap();
    send_garbage.send("{\"event\":\"RESET\",\"data\":{}}\n").unwrap();
    send_garbage.send("{\"event\":\"ACPI_DEVICE_OST\"}\n").unwrap();
    drop(send_garbage);
    let _other = broker.target("other");
    assert_eq!(is_left.recv_timeout(common::PATIENCE), Err(RecvTimeoutError::Disconnected));
    assert_eq!(broker.admin().targets().unwrap().len(), 2);
    let path = broker.path.clone();
    common::returns("the removal", move || Admin::connect(&path).unwrap().remove_target("fake"))
        .unwrap();
}

/// Answers like QEMU over QMP, but for what `lie` changes.
fn qmp(
    directory: &Path,
    fake: &Fake,
    lie: impl Fn(&str, Value) -> Value + Send + 'static,
) -> PathBuf {
    qmp_again(directory, fake, lie, &Arc::default())
}

/// The same to one client after the other; their connections are also the test's.
fn qmp_again(
    directory: &Path,
    fake: &Fake,
    lie: impl Fn(&str, Value) -> Value + Send + 'static,
    clients: &Arc<Mutex<Vec<UnixStream>>>,
) -> PathBuf {
    let hva = fake.hva();
    let path = directory.join("fake.qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let clients = Arc::clone(clients);
    let serve = move |stream: &UnixStream| {
        let mut writer = stream;
        // At once: the test may send something, too.
        let mut send = |value: Value| writer.write_all(format!("{value}\n").as_bytes());
        clients.lock().unwrap().push(stream.try_clone().unwrap());
        if send(json!({ "QMP": {} })).is_err() {
            return;
        }
        for line in BufReader::new(stream).lines() {
            let Ok(line) = line else { return };
            let request: Value = serde_json::from_str(&line).unwrap();
            let command = request["execute"].as_str().unwrap();
            let answer = fake::qmp_answer(&line, command, hva);
            if send(json!({ "return": lie(command, answer), "id": request["id"] })).is_err() {
                return;
            }
        }
    };
    std::thread::spawn(move || listener.incoming().for_each(|stream| serve(&stream.unwrap())));
    path
}

/// A wrapper has made the socket and handed it to QEMU: the process that listens is another one.
#[test]
fn a_handed_socket_is_listened_to_again_where_the_same_qemu_answers() {
    let broker = TestBroker::start();
    let fake = Fake::start("sealed", HONEST);
    let clients = Arc::new(Mutex::new(Vec::new()));
    let count = {
        let clients = Arc::clone(&clients);
        move || clients.lock().unwrap().len()
    };
    let (count_here, listens) = (count.clone(), Arc::new(AtomicBool::new(false)));
    let listens_here = Arc::clone(&listens);
    // The second to answer is another QEMU, to which the wrapper has handed a socket as well.
    let lie = move |command: &str, answer: Value| match answer.as_str() {
        _ if command == "query-status" => {
            listens_here.store(count_here() == 3, Ordering::SeqCst);
            answer
        }
        Some(text)
            if command == "human-monitor-command"
                && text.starts_with("Host")
                && count_here() == 2 =>
        {
            json!("Host virtual address for 0x0 (mem) is 0x7f0000000000\r\n")
        }
        _ => answer,
    };
    let directory = tempfile::tempdir().unwrap();
    let socket = qmp_again(directory.path(), &fake, lie, &clients);
    broker.admin().add_target(&Which::Qmp { socket, pid: Some(fake.pid()) }, None).unwrap();
    let request = GrantRequest { target: "fake".into(), ..request(Rights::ReadOnly) };
    let (mut link, _view) =
        HostLink::attach(&broker.path, &broker.grant(&request).token, true).unwrap();
    clients.lock().unwrap()[0].shutdown(Shutdown::Both).unwrap();
    wait_for("the same QEMU to be listened to again", || listens.load(Ordering::SeqCst));
    clients.lock().unwrap()[2].write_all(b"{\"event\":\"RESET\",\"data\":{}}\n").unwrap();
    assert!(matches!(link.wait(common::PATIENCE).unwrap(), Some(HostEvent::Changed { .. })));
}

#[test]
fn lies_over_qmp_are_measured_by_the_kernel() {
    let broker = TestBroker::start();
    let fake = Fake::start("sealed", HONEST);
    type Lie = fn(&str, Value) -> Value;
    let cases: Vec<(Lie, &str)> = vec![
        (
            |command, answer| {
                if command == "query-memdev" {
                    json!([{ "id": "mem", "size": SIZE * 2 }])
                } else {
                    answer
                }
            },
            "of 0x2000000 bytes of RAM from the start 0x4000000 are in memory backends",
        ),
        (
            |command, answer| match command {
                "query-memdev" => json!([{ "id": "mem", "size": SIZE * 2 }]),
                "query-memory-size-summary" => json!({ "base-memory": SIZE * 2 }),
                _ => answer,
            },
            "no memory of 64M at 0x",
        ),
        (
            |command, answer| match command {
                "human-monitor-command" => {
                    json!(answer.as_str().unwrap().replace("01ffffff", "ffffffff"))
                }
                _ => answer,
            },
            "no memory of 4294180864 that could be RAM",
        ),
        (
            |command, answer| match (command, answer.as_str()) {
                ("human-monitor-command", Some(text)) if text.starts_with("Host") => {
                    json!("Host virtual address for 0x0 (mem) is 0x1000")
                }
                _ => answer,
            },
            "no memory of 32M at 0x1000, where it says that RAM is",
        ),
        (
            |command, answer| match (command, answer.as_str()) {
                ("human-monitor-command", Some(text)) if text.starts_with("Host") => {
                    json!("No memory")
                }
                _ => answer,
            },
            "is not the answer to",
        ),
        (
            |command, answer| match command {
                "query-memory-devices" => json!([{ "type": "virtio-mem", "data": {} }]),
                _ => answer,
            },
            "of kind \"virtio-mem\"",
        ),
        (
            |command, answer| match command {
                "human-monitor-command" => {
                    json!(answer.as_str().unwrap().replace("mem\n", "mem\n  x\n  0 (prio\n"))
                }
                _ => answer,
            },
            "which is not a range",
        ),
        (|_, _| json!([]), "is not the answer to"),
    ];
    for (lie, words) in cases {
        let directory = tempfile::tempdir().unwrap();
        let socket = qmp(directory.path(), &fake, lie);
        let message = refusal(&broker, &Which::Qmp { socket, pid: Some(fake.pid()) });
        assert!(message.contains(words), "{message}");
    }
    let directory = tempfile::tempdir().unwrap();
    let socket = qmp(directory.path(), &fake, |_, answer| answer);
    // This process listens, and is no VMM.
    let message = refusal(&broker, &Which::Qmp { socket, pid: None });
    assert!(message.contains("give QEMU's process id too"), "{message}");
    let directory = tempfile::tempdir().unwrap();
    let socket = qmp(directory.path(), &fake, |_, answer| answer);
    let added =
        broker.admin().add_target(&Which::Qmp { socket, pid: Some(fake.pid()) }, None).unwrap();
    assert_eq!((added.target.identity.vcpus, added.evidence), (2, Evidence::Qmp));
}

#[test]
fn memory_that_is_plugged_in_between_two_questions_is_no_lie() {
    let broker = TestBroker::start();
    let fake = Fake::start("sealed", HONEST);
    let directory = tempfile::tempdir().unwrap();
    let is_asked = AtomicBool::new(false);
    // As if the backend were there only after the first question.
    let socket = qmp(directory.path(), &fake, move |command, answer| {
        let is_first = command == "query-memdev" && !is_asked.swap(true, Ordering::Relaxed);
        if is_first { json!([]) } else { answer }
    });
    let added =
        broker.admin().add_target(&Which::Qmp { socket, pid: Some(fake.pid()) }, None).unwrap();
    assert_eq!((added.copied, added.evidence), (None, Evidence::Qmp));
}

#[test]
fn a_qmp_socket_that_hangs_delays_no_other_client() {
    let broker = TestBroker::start();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("hangs.qmp");
    let listener = UnixListener::bind(&socket).unwrap();
    let began = Instant::now();
    std::thread::scope(|scope| {
        let waiting =
            scope.spawn(|| refusal(&broker, &Which::Qmp { socket: socket.clone(), pid: None }));
        let (_silent, _) = listener.accept().unwrap();
        let _own = broker.target("own");
        assert_eq!(broker.admin().targets().unwrap().len(), 1);
        assert!(!waiting.is_finished());
        let message = waiting.join().unwrap();
        assert!(message.contains("nothing answers"), "{message}");
    });
    assert!(began.elapsed() < Duration::from_secs(30));
}

/// A file system that answers nothing, as one whose server is gone; unmounted on drop.
struct HungMount {
    directory: tempfile::TempDir,
    /// The server's end. Once it is closed, what waits fails.
    server: Option<std::fs::File>,
}

impl HungMount {
    /// `None` where this process may not mount.
    fn start() -> Option<Self> {
        let server = std::fs::File::options().read(true).write(true).open("/dev/fuse").ok()?;
        let directory = tempfile::tempdir().unwrap();
        let data = format!("fd={},rootmode=40000,user_id=0,group_id=0", server.as_raw_fd());
        let data = std::ffi::CString::new(data).unwrap();
        let flags = rustix::mount::MountFlags::empty();
        let mounted =
            rustix::mount::mount("kvmmem-test", directory.path(), "fuse", flags, Some(&*data));
        mounted.ok()?;
        Some(Self { directory, server: Some(server) })
    }
}

impl Drop for HungMount {
    fn drop(&mut self) {
        drop(self.server.take());
        let flags = rustix::mount::UnmountFlags::DETACH;
        rustix::mount::unmount(self.directory.path(), flags).unwrap();
    }
}

#[test]
fn a_qmp_socket_on_a_file_system_that_hangs_is_refused_before_the_client_gives_up() {
    let Some(hung) = HungMount::start() else {
        return eprintln!("skipped: mounting needs root and /dev/fuse");
    };
    let broker = TestBroker::start();
    let socket = hung.directory.path().join("qmp");
    for _ in 0..3 {
        let message = refusal(&broker, &Which::Qmp { socket: socket.clone(), pid: None });
        assert!(message.contains(socket.to_str().unwrap()), "{message}");
        assert!(message.contains("its file system does not answer"), "{message}");
    }
}

#[test]
fn a_qmp_socket_has_one_connection_whatever_it_is_called() {
    let broker = TestBroker::start();
    let fake = Fake::start("sealed", HONEST);
    let directory = tempfile::tempdir().unwrap();
    // It serves one client at a time, as QEMU does.
    let socket = qmp(directory.path(), &fake, |_, answer| answer);
    let which = |socket| Which::Qmp { socket, pid: Some(fake.pid()) };
    broker.admin().add_target(&which(socket.clone()), None).unwrap();
    let [folder, link, hard] = ["folder", "link", "hard"].map(|name| directory.path().join(name));
    std::fs::create_dir(&folder).unwrap();
    std::os::unix::fs::symlink(&socket, &link).unwrap();
    std::fs::hard_link(&socket, &hard).unwrap();
    for name in [socket, folder.join("../fake.qmp"), link, hard] {
        let message = refusal(&broker, &which(name.clone()));
        assert!(message.contains("registered already"), "{}: {message}", name.display());
    }
}

#[test]
fn what_a_target_without_qmp_lacks_is_said_with_what_to_do() {
    let broker = TestBroker::start();
    let fake = Fake::start("sealed tables", HONEST);
    let mut admin = broker.admin();
    // How `--target` names VMs otherwise.
    for name in ["pid:1", "qmp:/run/x", "libvirt:web", "pid:x"] {
        let refused = admin.add_target(&Which::Pid(fake.pid()), Some(name)).unwrap_err();
        assert!(refused.to_string().contains("pid:, qmp: or libvirt:"), "{name}: {refused}");
    }
    admin.add_target(&Which::Pid(fake.pid()), Some("a b")).unwrap();
    let refused = admin.pause("a b").unwrap_err().to_string();
    let remedy = "kvmmem target remove 'a b', then kvmmem target add --qmp SOCKET --name 'a b'";
    assert!(refused.contains(remedy), "{refused}");
}
