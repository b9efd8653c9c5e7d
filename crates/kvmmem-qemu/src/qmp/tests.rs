// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What listens at a QMP socket may be anything.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use super::line::{LineError, Lines, MAX_RECEIVED};
use super::questions::MemoryBackend;
use super::*;

pub(crate) const GREETING: &str = "{\"QMP\":{\"version\":{},\"capabilities\":[]}}\n";

/// Answers `qmp_capabilities`.
pub(crate) const READY: &str = "{\"return\":{},\"id\":\"qmp_capabilities\"}\n";

/// Listens, and sends `lines` to the first that connects, one for the connection and one for each
/// line it gets; then stays silent until the client goes.
pub(crate) fn serve(lines: Vec<String>) -> (tempfile::TempDir, PathBuf, JoinHandle<()>) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut requests = io::BufReader::new(stream.try_clone().unwrap());
        for line in lines {
            if stream.write_all(line.as_bytes()).is_err() {
                return;
            }
            let mut request = String::new();
            let _ = io::BufRead::read_line(&mut requests, &mut request);
        }
        let _ = requests.read_to_end(&mut Vec::new());
    });
    (directory, path, thread)
}

fn backends(lines: &[&str]) -> Result<Vec<MemoryBackend>, QmpError> {
    let (_directory, path, thread) = serve(lines.iter().map(|line| (*line).to_owned()).collect());
    let answer = Qmp::connect(&path).and_then(|mut qmp| qmp.memory_backends());
    thread.join().unwrap();
    answer
}

#[test]
fn answers_are_found_between_events() {
    let answer = "{\"event\":\"RESET\",\"data\":{}}\n{\"return\":[{\"id\":\"m\",\"size\":5,\"share\":true,\"x\":1}]}\n";
    let expected = MemoryBackend { id: Some("m".into()), size: 5, share: Some(true) };
    assert_eq!(backends(&[GREETING, READY, answer]).unwrap(), [expected]);
}

#[test]
fn answers_to_the_client_before_are_passed_over() {
    let late = "{\"return\":[{\"id\":\"late\",\"size\":1}]}\n";
    let refusal = "{\"error\":{\"desc\":\"no\"}}\n";
    let answer = "{\"return\":[{\"id\":\"m\",\"size\":5,\"share\":true}]}\n";
    let expected = [MemoryBackend { id: Some("m".into()), size: 5, share: Some(true) }];
    for early in [late, refusal, READY, "{\"event\":\"RESET\"}\n"] {
        let greeting = format!("{early}{GREETING}");
        assert_eq!(backends(&[&greeting, READY, answer]).unwrap(), expected, "{early}");
        let ready = format!("{early}{READY}");
        assert_eq!(backends(&[GREETING, &ready, answer]).unwrap(), expected, "{early}");
    }
}

#[test]
fn garbage_is_refused() {
    for lines in [
        vec!["SSH-2.0-x\n"],
        vec!["{}\n"],
        vec!["{\"return\":{}}\n[]\n"],
        vec![GREETING, "]\n"],
        vec![GREETING, READY, "{\"return\":{}}\n"],
        vec![GREETING, READY, "{\"return\":[{\"id\":1}]}\n"],
        vec![GREETING, READY, "\u{0}\n"],
    ] {
        assert!(matches!(backends(&lines), Err(QmpError::Garbage { .. })), "{lines:?}");
    }
    let deep = "[".repeat(100_000) + "\n";
    assert!(matches!(backends(&[&deep]), Err(QmpError::Garbage { .. })));
    let refusal = "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"no\"}}\n";
    assert!(matches!(backends(&[GREETING, READY, refusal]), Err(QmpError::Refused { .. })));
}

/// A connection to what sends `line` without end after two answers.
pub(crate) fn flooded(line: &str) -> (tempfile::TempDir, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let block = line.repeat(10_000);
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(format!("{GREETING}{READY}").as_bytes()).unwrap();
        while stream.write_all(block.as_bytes()).is_ok() {}
    });
    (directory, Qmp::connect(&path).unwrap())
}

#[test]
fn a_line_without_end_is_too_much() {
    let (ours, mut theirs) = UnixStream::pair().unwrap();
    let sender = std::thread::spawn(move || theirs.write_all(&vec![b'x'; MAX_RECEIVED + 1]));
    let next = Lines::new(ours.into()).next(Instant::now() + std::time::Duration::from_secs(60));
    assert!(matches!(next, Err(LineError::TooMuch)), "{next:?}");
    // The rest may not have been taken.
    let _ = sender.join().unwrap();
}

#[test]
fn what_hangs_or_never_ends_is_left() {
    assert!(matches!(backends(&[]), Err(QmpError::Silent(_))));
    assert!(matches!(backends(&[GREETING, "{\"return\""]), Err(QmpError::Silent(_))));
    let endless = "x".repeat(MAX_RECEIVED + 1);
    // A machine with much else to do may not take so much in the time there is.
    assert!(matches!(backends(&[&endless]), Err(QmpError::TooMuch(_) | QmpError::Silent(_))));
    let event = format!("{{\"event\":\"{}\"}}\n", "X".repeat(100_000));
    let events = event.repeat(MAX_RECEIVED / 100_000 + 1);
    assert!(matches!(
        backends(&[GREETING, &events]),
        Err(QmpError::TooMuch(_) | QmpError::Silent(_))
    ));
    let nowhere = Path::new("/nowhere/qmp.sock");
    assert!(matches!(Qmp::connect(nowhere), Err(QmpError::Connect { .. })));
}

#[test]
fn a_full_queue_of_connections_is_a_socket_that_another_client_uses() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp.sock");
    let listener = UnixListener::bind(&path).unwrap();
    // The standard library listens with the longest queue; QEMU's is of one connection.
    rustix::net::listen(&listener, 0).unwrap();
    let _other = UnixStream::connect(&path).unwrap();
    let error = Qmp::connect(&path).unwrap_err();
    assert!(matches!(error, QmpError::Silent(_)), "{error:?}");
}
