// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Output that cannot be written, and a pipe that names patterns.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;

use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::process::Signal;

use crate::{kvmmem, texts};

/// A folder with `ram.raw`, 64 KiB of one text, and its path.
fn dump() -> (tempfile::TempDir, String) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ram.raw");
    std::fs::write(&file, b"some text\0".repeat(6554)).unwrap();
    let file = file.to_str().unwrap().to_owned();
    (directory, file)
}

#[test]
fn a_command_whose_reader_has_closed_the_pipe_ends_by_sigpipe() {
    let (_directory, file) = dump();
    for arguments in [
        &["scan", "--text", "text", "--file", &file][..],
        &["strings", "--file", &file],
        &["strings", "--json", "--file", &file],
        &["read", "0", "4096", "--file", &file],
        &["read", "0", "4096", "--raw", "--file", &file],
        &["doctor"],
        &["--help"],
    ] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = kvmmem(arguments).stdout(writer).spawn().unwrap().wait_with_output().unwrap();
        assert_eq!(output.status.signal(), Some(Signal::PIPE.as_raw()), "{arguments:?}");
        assert_eq!(texts(output).2, "", "{arguments:?}");
    }
}

#[test]
fn output_that_cannot_be_written_is_an_error() {
    let (_directory, file) = dump();
    for (arguments, code) in [
        (&["--help"][..], 1),
        (&["scan", "--help"], 1),
        (&["--version"], 1),
        (&["read", "0", "16", "--file", &file], 1),
        (&["scan", "--text", "text", "--file", &file], 2),
    ] {
        let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
        let output = kvmmem(arguments).stdout(full).spawn().unwrap().wait_with_output().unwrap();
        let (exit, _, stderr) = texts(output);
        assert_eq!(exit, Some(code), "{arguments:?}: {stderr}");
        assert!(
            stderr.contains("cannot write the output: No space left"),
            "{arguments:?}: {stderr}"
        );
    }
}

#[test]
fn a_pipe_of_patterns_is_waited_for_with_a_message() {
    let (directory, file) = dump();
    let fifo = directory.path().join("patterns");
    mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR).unwrap();
    let fifo = fifo.to_str().unwrap();
    let arguments = ["scan", "--patterns", fifo, "--file", &file, "--max", "1"];
    let mut child = kvmmem(&arguments).spawn().unwrap();
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    let mut line = String::new();
    stderr.read_line(&mut line).unwrap();
    assert_eq!(line, format!("warning: {fifo} is a pipe; still waiting for its writer\n"));
    File::options().write(true).open(fifo).unwrap().write_all(b"word text some\n").unwrap();
    let (code, stdout, _) = texts(child.wait_with_output().unwrap());
    stderr.read_to_string(&mut line).unwrap();
    assert_eq!((code, stdout.lines().count()), (Some(0), 1), "{line}");
}
