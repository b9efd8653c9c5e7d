// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A dump to a pipe, and to what takes none.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::Value;

use super::{dump, part, path};
use crate::common::blocked::Blocked;
use crate::common::{Host, finish, signal, wait_for};
use crate::{host, large};

/// A dump to standard output: exit code, bytes, standard error.
fn streamed(host: &Host, arguments: &[&str]) -> (Option<i32>, Vec<u8>, String) {
    let arguments = [&["dump", "-"], arguments].concat();
    let output = host.view(&host.grant(&[]).1, &arguments).output().unwrap();
    (output.status.code(), output.stdout, String::from_utf8(output.stderr).unwrap())
}

#[test]
fn a_pipe_gets_every_byte_in_order_and_words_go_elsewhere() {
    let host = host();
    host.put((4 << 20) - 2, b"data");
    host.put((16 << 20) + 0x5000, b"more");
    for format in ["raw", "elf"] {
        let ended = dump(&host, &[], &["--format", format, "--json"]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let record: Value = serde_json::from_str(&ended.stdout).unwrap();
        let file = fs::read(path(&host)).unwrap();
        let (code, bytes, words) = streamed(&host, &["--format", format]);
        assert_eq!(code, Some(0), "{words}");
        assert!(bytes == file, "{format}");
        assert!(words.contains("bytes, of which"), "{words}");
        let (code, bytes, words) = streamed(&host, &["--format", format, "--json"]);
        assert!(code == Some(0) && bytes == file, "{words}");
        assert_eq!(serde_json::from_str::<Value>(&words).unwrap()["sha256"], record["sha256"]);
        for file in ["dump", "dump.json"] {
            fs::remove_file(host.path(file)).unwrap();
        }
    }
    assert!(!Path::new("-").exists() && !Path::new("-.json").exists());

    // By its other names, and a FIFO.
    let fifo = host.path("fifo");
    assert!(Command::new("mkfifo").arg(&fifo).status().unwrap().success());
    let record = host.path("record");
    let arguments = ["dump", fifo.to_str().unwrap(), "--record", record.to_str().unwrap()];
    let child = host.view(&host.grant(&[]).1, &arguments).spawn().unwrap();
    let bytes = fs::read(&fifo).unwrap();
    let ended = finish(child);
    assert_eq!((ended.code, bytes.len()), (Some(0), 20 << 20), "{}", ended.stderr);
    assert!(record.exists() && !host.path("fifo.json").exists());
    let output = host.view(&host.grant(&[]).1, &["dump", "/dev/stdout"]).output().unwrap();
    assert!(output.stdout == bytes);
}

#[test]
fn what_cannot_take_a_dump_is_named_and_the_token_is_kept() {
    let host = host();
    host.put(0, b"data");
    let (_, token) = host.grant(&[]);
    fs::create_dir(host.path("folder")).unwrap();
    fs::write(host.path("plain"), "").unwrap();
    let refused = |to: &str, more: &[&str], words: &str| {
        let ended = finish(host.view(&token, &[&["dump", to], more].concat()).spawn().unwrap());
        assert_eq!(ended.code, Some(1), "{to}: {}", ended.stderr);
        assert!(ended.stderr.contains(words), "{to}: {}", ended.stderr);
    };
    let place = |name: &str| host.path(name).to_str().unwrap().to_owned();
    refused(&place("folder"), &[], "is a folder");
    refused(&place("plain/dump"), &[], "Not a directory");
    refused(&place("none/dump"), &[], "No such file");
    refused(&place("broker.sock"), &[], "is a socket");
    refused("-", &["--resume"], "cannot be resumed");
    refused(&place("dump"), &["--record", &place("plain")], "exists");
    refused(&place("dump"), &["--record", &place("none/record")], "No such file");
    refused(&place("dump"), &["--record", &place("dump")], "the dump itself");
    assert!(!path(&host).exists());
    // None of them has used the token; a device that is full does.
    let ended =
        finish(host.view(&token, &["dump", path(&host).to_str().unwrap()]).spawn().unwrap());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    fs::remove_file(path(&host)).unwrap();
    fs::remove_file(host.path("dump.json")).unwrap();
    let (_, token) = host.grant(&[]);
    let ended = finish(host.view(&token, &["dump", "/dev/full"]).spawn().unwrap());
    assert!(ended.code == Some(1) && ended.stderr.contains("No space left"), "{}", ended.stderr);

    // A token that opens nothing leaves no files.
    let ended =
        finish(host.view(&token, &["dump", path(&host).to_str().unwrap()]).spawn().unwrap());
    assert_eq!(ended.code, Some(1));
    assert!(!path(&host).exists() && !part(&host).exists());
}

#[test]
fn a_reset_that_the_end_of_the_view_hides_makes_a_dump_stale() {
    for is_reset in [false, true] {
        let host = host();
        // One page at the end, after more zeros than a pipe takes: it is read before them.
        host.put((20 << 20) - 4, b"data");
        let (grant, token) = host.grant(&[]);
        let blocked = Blocked::start(host.view(&token, &["dump", "-"]));
        if is_reset {
            host.reset();
        }
        host.ask(&["grant", "revoke", &grant]);
        let (ended, bytes) = blocked.end();
        assert_eq!(ended.code, Some(i32::from(is_reset)), "{}", ended.stderr);
        assert!(bytes.ends_with(b"data"));
        let words = "was reset or resized in the middle of the dump: begin again";
        assert_eq!(ended.stderr.contains(words), is_reset, "{}", ended.stderr);
    }
}

#[test]
fn a_terminal_gets_no_dump() {
    let host = host();
    let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&master).unwrap();
    unlockpt(&master).unwrap();
    let name = ptsname(&master, Vec::new()).unwrap().into_string().unwrap();
    let terminal = File::options().read(true).write(true).open(&name).unwrap();
    for to in ["-", name.as_str()] {
        let mut command = host.view(&host.grant(&[]).1, &["dump", to]);
        let ended = finish(command.stdout(terminal.try_clone().unwrap()).spawn().unwrap());
        assert!(
            ended.code == Some(1) && ended.stderr.contains("is a terminal"),
            "{}",
            ended.stderr
        );
    }
}

#[test]
fn a_reader_that_leaves_ends_the_dump_with_a_reason() {
    let host = large();
    let mut child = host.view(&host.grant(&[]).1, &["dump", "-"]).spawn().unwrap();
    drop(child.stdout.take());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.signal(), Some(Signal::PIPE.as_raw()));
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("the reader has closed the pipe: the dump is not complete"),
        "{stderr}"
    );
}

#[test]
fn the_first_signal_ends_a_dump_to_a_pipe_that_is_not_read() {
    let host = large();
    // What cannot be compressed, and more of it than a pipe holds.
    let mut state = 1u64;
    let noise = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        state.to_le_bytes()[7]
    });
    host.put(0, &noise.take(8 << 20).collect::<Vec<u8>>());
    let cases = [Signal::INT, Signal::TERM, Signal::HUP];
    for (number, how) in (0..).zip(cases.iter().chain(&cases)) {
        let compress: &[&str] = if number < cases.len() { &[] } else { &["--compress", "zstd"] };
        let (_reader, writer) = std::io::pipe().unwrap();
        let mut command = host.view(&host.grant(&[]).1, &[&["dump", "-"], compress].concat());
        let mut child = command.stdout(writer.try_clone().unwrap()).spawn().unwrap();
        drop(command);
        wait_for(Path::new("the pipe to be full"), |_| {
            poll(&mut [PollFd::new(&writer, PollFlags::OUT)], Some(&Timespec::default())).unwrap()
                == 0
        });
        signal(&child, *how);
        let deadline = Instant::now() + Duration::from_secs(60);
        while child.try_wait().unwrap().is_none() {
            if Instant::now() > deadline {
                child.kill().unwrap();
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let ended = finish(child);
        assert_eq!(ended.code, Some(1), "{how:?} {compress:?}: {}", ended.stderr);
        for words in ["the dump stopped at gpa 0x", "interrupted"] {
            assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
        }
    }
}
