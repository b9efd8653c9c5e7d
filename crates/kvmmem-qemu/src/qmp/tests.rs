// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What listens at a QMP socket may be anything.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::thread::JoinHandle;

use super::line::{LineError, Lines, MAX_RECEIVED};
use super::questions::MemoryBackend;
use super::*;

pub(crate) const GREETING: &str = "{\"QMP\":{\"version\":{},\"capabilities\":[]}}\n";

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
    assert_eq!(backends(&[GREETING, "{\"return\":{}}\n", answer]).unwrap(), [expected]);
}

#[test]
fn garbage_is_refused() {
    let ready = "{\"return\":{}}\n";
    for lines in [
        vec!["SSH-2.0-x\n"],
        vec!["{}\n"],
        vec!["{\"return\":{}}\n"],
        vec![GREETING, "]\n"],
        vec![GREETING, ready, "{\"return\":{}}\n"],
        vec![GREETING, ready, "{\"return\":[{\"id\":1}]}\n"],
        vec![GREETING, ready, "\u{0}\n"],
    ] {
        assert!(matches!(backends(&lines), Err(QmpError::Garbage { .. })), "{lines:?}");
    }
    let deep = "[".repeat(100_000) + "\n";
    assert!(matches!(backends(&[&deep]), Err(QmpError::Garbage { .. })));
    let refusal = "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"no\"}}\n";
    assert!(matches!(backends(&[GREETING, ready, refusal]), Err(QmpError::Refused { .. })));
}

/// A connection to what sends `line` without end after two answers.
pub(crate) fn flooded(line: &str) -> (tempfile::TempDir, Qmp) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("qmp.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let block = line.repeat(10_000);
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(format!("{GREETING}{{\"return\":{{}}}}\n").as_bytes()).unwrap();
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
