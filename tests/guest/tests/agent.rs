// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The agent's side of a connection, served over a unix socket instead of vsock.
#![deny(unsafe_code)]

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use kvmmem_guest::channel::Channel;
use kvmmem_guest::frame::Kind;
use kvmmem_guest::request::{Reply, Request};
use kvmmem_guest::{Command, ExitStatus};

/// How long anything may take.
const LIMIT: Duration = Duration::from_secs(120);

/// Starts the agent for one connection and asks it.
fn ask(request: &Request) -> Channel {
    ask_over(UnixStream::pair().unwrap(), request)
}

fn ask_over((ours, theirs): (UnixStream, UnixStream), request: &Request) -> Channel {
    let mut agent = std::process::Command::new(env!("CARGO_BIN_EXE_kvmmem-guest"))
        .arg("connection")
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    // It ends with its connection.
    std::thread::spawn(move || agent.wait());
    let mut channel = Channel::new(ours.into());
    channel.send(Kind::Request, &serde_json::to_vec(request).unwrap()).unwrap();
    channel
}

fn exec(words: &[&str]) -> Channel {
    let command = Command::new(words[0]).args(words[1..].iter().copied());
    ask(&Request::Exec(command))
}

/// All output of a process until its end.
fn finish(channel: &mut Channel) -> (String, String, ExitStatus) {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        let frame =
            channel.receive(Some(Instant::now() + LIMIT)).unwrap().expect("the agent closed");
        match frame.kind {
            Kind::Stdout => stdout.extend(frame.payload),
            Kind::Stderr => stderr.extend(frame.payload),
            Kind::Exit => {
                let text = |bytes| String::from_utf8(bytes).unwrap();
                return (
                    text(stdout),
                    text(stderr),
                    serde_json::from_slice(&frame.payload).unwrap(),
                );
            }
            other => panic!("unexpected {other:?}"),
        }
    }
}

fn reply(channel: &mut Channel) -> Reply {
    let frame = channel.receive(Some(Instant::now() + LIMIT)).unwrap().expect("the agent closed");
    assert_eq!(frame.kind, Kind::Reply);
    serde_json::from_slice(&frame.payload).unwrap()
}

/// Only root can take on users and groups.
fn is_root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        println!("skipped: the agent runs programs as root only: run the tests as root");
    }
    root
}

#[test]
fn output_and_exit_code_come_back() {
    if is_root() {
        let mut channel = exec(&["/bin/sh", "-c", "echo out; echo err >&2; exit 3"]);
        assert_eq!(
            finish(&mut channel),
            ("out\n".to_owned(), "err\n".to_owned(), ExitStatus::Code(3))
        );
    }
}

#[test]
fn all_output_comes_before_the_exit_code_however_slowly_it_is_read() {
    if is_root() {
        let (ours, theirs) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&theirs, 4096).unwrap();
        let script = "echo $$; read line; head -c 60000 /dev/zero; head -c 60000 /dev/zero >&2";
        let command = Command::new("/bin/sh").args(["-c", script]);
        let mut channel = ask_over((ours, theirs), &Request::Exec(command));
        let first = channel.receive(Some(Instant::now() + LIMIT)).unwrap().unwrap();
        let pid = String::from_utf8(first.payload).unwrap();
        channel.send(Kind::Stdin, b"\n").unwrap();
        // Pipes hold what it writes, and the agent cannot send it.
        let stat = format!("/proc/{}/stat", pid.trim());
        let end = Instant::now() + LIMIT;
        while !std::fs::read_to_string(&stat).unwrap().contains(") Z ") {
            assert!(Instant::now() < end, "the program does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
        // Longer than an agent would wait that did so for a limited time.
        std::thread::sleep(Duration::from_secs(1));
        let (stdout, stderr, status) = finish(&mut channel);
        assert_eq!((stdout.len(), stderr.len(), status), (60000, 60000, ExitStatus::Code(0)));
    }
}

#[test]
fn the_program_runs_as_the_user_asked_for() {
    if is_root() {
        let command = Command::new("/bin/sh")
            .args(["-c", "id -u; id -g; id -G; echo $VARIABLE; pwd; ulimit -l"])
            .user(1000, 1000, &[990])
            .env("VARIABLE", "value")
            .cwd("/tmp")
            .memlock(64 << 10);
        let (stdout, stderr, status) = finish(&mut ask(&Request::Exec(command)));
        assert_eq!(stdout, "1000\n1000\n1000 990\nvalue\n/tmp\n64\n", "{stderr}");
        assert_eq!(status, ExitStatus::Code(0));
    }
}

#[test]
fn a_program_that_is_not_there_ends_with_127() {
    if is_root() {
        let (_, stderr, status) = finish(&mut exec(&["/nowhere/at/all"]));
        assert_eq!(status, ExitStatus::Code(127));
        assert!(stderr.contains("No such file"), "{stderr}");
    }
}

#[test]
fn stdin_reaches_the_program_and_ends() {
    if is_root() {
        let mut channel = exec(&["/bin/cat"]);
        channel.send(Kind::Stdin, b"one\n").unwrap();
        channel.send(Kind::Stdin, b"two\n").unwrap();
        channel.send(Kind::Stdin, b"").unwrap();
        assert_eq!(finish(&mut channel).0, "one\ntwo\n");
    }
}

#[test]
fn a_signal_reaches_the_program() {
    if is_root() {
        let mut channel = exec(&["/bin/sh", "-c", "echo up; exec sleep 1000"]);
        let first = channel.receive(Some(Instant::now() + LIMIT)).unwrap().unwrap();
        assert_eq!(first.payload, b"up\n");
        channel.send(Kind::Signal, &15_i32.to_le_bytes()).unwrap();
        assert_eq!(finish(&mut channel).2, ExitStatus::Signal(15));
    }
}

#[test]
fn dropping_the_connection_kills_the_program() {
    if is_root() {
        let mut channel = exec(&["/bin/sh", "-c", "echo $$; exec sleep 1000"]);
        let first = channel.receive(Some(Instant::now() + LIMIT)).unwrap().unwrap();
        let pid = String::from_utf8(first.payload).unwrap();
        let process = format!("/proc/{}", pid.trim());
        assert!(Path::new(&process).exists());
        drop(channel);
        let end = Instant::now() + LIMIT;
        while Path::new(&process).exists() {
            assert!(Instant::now() < end, "{process} lives on");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

#[test]
fn what_a_program_left_behind_ends_with_its_client() {
    if is_root() {
        let mut channel = exec(&["/bin/sh", "-c", "sleep 1000 >&- 2>&- & echo $!"]);
        let (stdout, _, status) = finish(&mut channel);
        assert_eq!(status, ExitStatus::Code(0));
        let process = format!("/proc/{}/stat", stdout.trim());
        let is_alive =
            || std::fs::read_to_string(&process).is_ok_and(|stat| !stat.contains(") Z "));
        assert!(is_alive(), "it ends with the program");
        channel.finish(Instant::now() + LIMIT);
        assert!(!is_alive(), "{process} lives on");
    }
}

#[test]
fn a_file_that_was_put_can_be_got() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new/file").to_string_lossy().into_owned();
    let bytes: Vec<u8> = (0..200_000_u32).map(|index| index.to_le_bytes()[0]).collect();
    let mut channel =
        ask(&Request::Put { path: path.clone(), mode: 0o600, length: bytes.len() as u64 });
    channel.send(Kind::Data, &bytes).unwrap();
    assert_eq!(reply(&mut channel).error, None);

    let mut channel = ask(&Request::Get { path });
    let mut got = Vec::new();
    loop {
        let frame =
            channel.receive(Some(Instant::now() + LIMIT)).unwrap().expect("the agent closed");
        if frame.kind == Kind::Reply {
            break;
        }
        got.extend(frame.payload);
    }
    assert_eq!(got, bytes);
}

#[test]
fn refusals_carry_the_error_number() {
    let error =
        reply(&mut ask(&Request::Get { path: "/nowhere/at/all".to_owned() })).error.unwrap();
    assert_eq!(error.errno, Some(2));
    let long = Request::Put { path: "/tmp/never".to_owned(), mode: 0o600, length: u64::MAX };
    assert!(reply(&mut ask(&long)).error.is_some());
}

#[test]
fn nonsense_ends_the_connection() {
    for (kind, bytes) in
        [(Kind::Stdout, b"x".as_slice()), (Kind::Request, b"{}"), (Kind::Request, b"\xff")]
    {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let mut agent = std::process::Command::new(env!("CARGO_BIN_EXE_kvmmem-guest"))
            .arg("connection")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut channel = Channel::new(ours.into());
        channel.send(kind, bytes).unwrap();
        assert_eq!(channel.receive(Some(Instant::now() + LIMIT)).unwrap(), None);
        assert!(!agent.wait().unwrap().success());
    }
}
