// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The verbs about Linux guests, on dumps of guests in which a builder wrote a kernel.

use std::fs::File;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use linux::processes::{COMM, task};
use linux::{Guest, Place, UTS};
use rustix::fs::{Mode, OFlags, open};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{Winsize, tcsetwinsize};
use serde_json::Value;
use tempfile::TempDir;

#[path = "../../kvmmem-linux/tests/common/mod.rs"]
mod linux;

/// A raw dump of a guest.
fn dump(guest: &Guest) -> (TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("guest.raw");
    std::fs::write(&path, guest.bytes(0, linux::RAM)).unwrap();
    (directory, path)
}

fn kvmmem(arguments: &[&str], dump: &PathBuf) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmem"));
    command.args(arguments).arg("--file").arg(dump).stdin(Stdio::null());
    for variable in ["RUST_LOG", "CLICOLOR_FORCE", "KVMMEM_TOKEN"] {
        command.env_remove(variable);
    }
    command
}

fn run(arguments: &[&str], dump: &PathBuf) -> (Option<i32>, String, String) {
    let output = kvmmem(arguments, dump).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn names_of_a_guest_are_exact_in_json_and_cannot_drive_a_terminal() {
    // C1 controls, DEL and a mark that turns text around.
    let name = "\u{9b}2J\u{7f}\u{85}\u{202e}x\u{1b}";
    let guest = linux::processes::guest();
    guest.put(Place::FIRST.gpa + task(2) + COMM, &[0; 16]);
    guest.put(Place::FIRST.gpa + task(2) + COMM, name.as_bytes());
    // The host name follows the system's.
    guest.put(Place::FIRST.gpa + UTS + 65, name.as_bytes());
    let (_directory, path) = dump(&guest);
    let (_, stdout, _) = run(&["info", "--json"], &path);
    assert!(stdout.chars().all(|c| c == '\n' || (' '..='~').contains(&c)), "{stdout:?}");
    let row: Value = serde_json::from_str(&stdout).unwrap();
    assert_eq!(row["host_name"], name);
    let (code, stdout, _) = run(&["ps"], &path);
    assert_eq!(code, Some(0));
    assert!(stdout.contains(r"\u{9b}2J\u{7f}\u{85}\u{202e}x\u{1b}"), "{stdout:?}");
    assert!(stdout.chars().all(|c| c == '\n' || (' '..='~').contains(&c)), "{stdout:?}");
}

#[test]
fn what_info_does_not_find_is_named() {
    let (_directory, path) = dump(&linux::processes::guest());
    let (code, stdout, stderr) = run(&["info"], &path);
    assert_eq!(code, Some(3), "{stderr}");
    assert!(stdout.contains(linux::RELEASE), "{stdout}");
    for words in [
        "not found: the command line (this kernel has no symbol saved_command_line",
        "the boot time (",
    ] {
        assert!(stderr.contains(words), "{stderr}");
    }
    assert!(!stderr.contains("the build id"), "{stderr}");
    let (code, stdout, stderr) = run(&["info", "--json"], &path);
    let (row, error): (Value, Value) =
        (serde_json::from_str(&stdout).unwrap(), serde_json::from_str(&stderr).unwrap());
    assert_eq!((code, &row["booted"], &row["command_line"]), (Some(3), &Value::Null, &Value::Null));
    assert!(error["error"].as_str().unwrap().starts_with("not found: "), "{error}");
}

#[test]
fn rows_are_cut_at_the_edge_of_a_terminal_alone() {
    let (_directory, path) = dump(&linux::processes::guest());
    let on_terminal = |arguments: &[&str]| {
        let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
        grantpt(&terminal).unwrap();
        unlockpt(&terminal).unwrap();
        let name = ptsname(&terminal, Vec::new()).unwrap();
        let screen =
            open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
        let size = Winsize { ws_row: 24, ws_col: 44, ws_xpixel: 0, ws_ypixel: 0 };
        tcsetwinsize(&screen, size).unwrap();
        let mut child = kvmmem(arguments, &path).stdout(screen).spawn().unwrap();
        let mut text = Vec::new();
        // It ends with an error once the other end is closed.
        let _ = File::from(terminal).read_to_end(&mut text);
        assert!(child.wait().unwrap().success());
        String::from_utf8(text).unwrap().replace('\r', "")
    };
    let (_, whole, _) = run(&["ps"], &path);
    let last = "77   0     1001  S      1.00   [exactly15chars!]";
    assert_eq!(whole.lines().last(), Some(last));
    let cut = on_terminal(&["ps"]);
    let line: String = last.chars().take(43).chain(['…']).collect();
    assert_eq!(cut.lines().last(), Some(line.as_str()));
    assert_eq!(on_terminal(&["ps", "--wide"]), whole);
}
