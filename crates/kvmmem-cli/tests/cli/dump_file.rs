// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Verbs of a dump file.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::{kvmmem, run, texts};

/// A raw dump with tables of four levels at 0x1000, which map one page.
fn dump_with_tables(directory: &Path) -> String {
    let mut memory = vec![0; 0x8000];
    for (at, value) in [(0x1000, 0x2007_u64), (0x2000, 0x3007), (0x3000, 0x4007), (0x4008, 0x5007)] {
        memory[at..at + 8].copy_from_slice(&value.to_le_bytes());
    }
    memory[0x5ff0..0x6000].copy_from_slice(b"end of the page!");
    let path = directory.join("dump");
    std::fs::write(&path, memory).unwrap();
    path.to_str().unwrap().to_owned()
}

#[test]
fn a_dump_file_is_read_translated_and_watched() {
    let directory = tempfile::tempdir().unwrap();
    let file = dump_with_tables(directory.path());
    let run = |arguments: &[&str]| run(&[arguments, &["--file", &file]].concat());
    let (code, stdout, stderr) = run(&["read", "0x5ff0", "16", "--raw"]);
    assert_eq!((code, stdout.as_str(), stderr.as_str()), (Some(0), "end of the page!", ""));
    let (code, stdout, _) = run(&["read", "--cr3", "0x1000", "0x1ff0", "16", "--raw"]);
    assert_eq!((code, stdout.as_str()), (Some(0), "end of the page!"));
    let (code, stdout, _) = run(&["read", "--cr3", "0x1000", "0x1ff0", "16", "--json"]);
    assert_eq!((code, stdout.contains("\"gva\":\"0x1ff0\"")), (Some(0), true), "{stdout}");
    // Where the file ends, and where the tables map nothing, the read ends.
    let (code, stdout, stderr) = run(&["read", "0x7ff0", "32"]);
    assert_eq!((code, stdout.lines().count()), (Some(1), 1), "{stderr}");
    assert!(stderr.contains("after 0x10 of 0x20 bytes"), "{stderr}");
    let (code, _, stderr) = run(&["read", "--cr3", "0x1000", "0x1ff8", "16"]);
    assert_eq!((code, stderr.contains("after 0x8 of 0x10 bytes")), (Some(1), true), "{stderr}");
    let translated = "0x0000000000001ff0  0x000000005ff0  4 KiB  rwx  user\n";
    for arguments in [&["translate", "0x1000", "0x1ff0"][..], &["translate", "--cr3", "0x1000", "0x1ff0"]] {
        let (code, stdout, stderr) = run(arguments);
        assert_eq!((code, stdout.as_str()), (Some(0), translated), "{stderr}");
    }
    assert_eq!(run(&["translate", "0x1000", "0x1ff0", "0x2000"]).0, Some(3));
    let (code, stdout, stderr) = run(&["watch", "0x5ff0", "16", "--count", "2", "--interval", "1ms"]);
    assert_eq!((code, stdout.lines().count()), (Some(0), 1), "{stderr}");
    // What is no Linux has no processes and no kernel.
    for space in [&["--pid", "1"][..], &["--cr3", "kernel"]] {
        for verb in [&["read", "0", "1"][..], &["watch", "0", "1"], &["translate", "0"]] {
            let (code, _, stderr) = run(&[verb, space].concat());
            assert_eq!(
                (code, stderr.contains("no Linux kernel was found")),
                (Some(1), true),
                "{verb:?}: {stderr}"
            );
        }
    }
    let wrong: [(&[&str], &str); 8] = [
        (&["read", "0", "1", "--pid", "1", "--cr3", "0"], "--cr3"),
        (&["read", "0", "1", "--pid", "1", "--levels", "4"], "--levels"),
        (&["read", "0", "1", "--note", "0"], "--pid PID and --cr3 kernel"),
        (&["watch", "0", "1", "--cr3", "0x1000"], "not by --cr3 0x1000"),
        (&["translate", "--pid", "1", "kernel"], "no guest-virtual address"),
        (&["translate", "0x1000"], "GVA"),
        (&["translate", "--pid", "1", "--levels", "4", "0"], "--levels"),
        (&["write", "0", "00"], "--file"),
    ];
    for (arguments, words) in wrong {
        let (code, _, stderr) = run(arguments);
        assert_eq!((code, stderr.contains(words)), (Some(2), true), "{arguments:?}: {stderr}");
    }
}

#[test]
fn a_dump_without_a_kernel_is_an_error_and_no_empty_table() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("dump");
    std::fs::write(&path, [0x55; 0x3000]).unwrap();
    let file = path.to_str().unwrap();
    for verb in GUEST_VERBS {
        let (code, stdout, stderr) = run(&[verb, "--file", file]);
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{verb}");
        assert!(stderr.starts_with(&format!("error: {file}: no Linux kernel was found")), "{verb}: {stderr}");
        let (code, _, stderr) = run(&[verb, "--file", file, "--note", "0x1000"]);
        assert_eq!(code, Some(1));
        assert!(stderr.contains("0x1000"), "{verb}: {stderr}");
        let (code, _, stderr) = run(&[verb, "--file", file, "--target", "web-1"]);
        assert_eq!(code, Some(2), "{verb}: {stderr}");
        let (code, _, stderr) = run(&[verb]);
        assert_eq!(code, Some(1), "{verb}: {stderr}");
    }
}

/// The verbs about Linux guests.
const GUEST_VERBS: [&str; 9] =
    ["ps", "maps", "mounts", "files", "sockets", "check", "dmesg", "modules", "info"];

#[test]
fn a_guest_verb_without_a_source_names_all_of_them() {
    for verb in GUEST_VERBS {
        let (code, stdout, stderr) = run(&[verb]);
        assert_eq!((code, stdout.as_str()), (Some(1), ""), "{verb}");
        for option in ["--file DUMP", "--target NAME", "--token-file", "--listen"] {
            assert!(stderr.contains(option), "{verb} {option}: {stderr}");
        }
    }
}

#[test]
fn a_dump_that_is_no_file_is_refused_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), rustix::fs::FileType::Fifo, mode, 0).unwrap();
    std::fs::write(path("empty"), "").unwrap();
    for (name, words) in [
        (path("fifo"), "is a pipe: write what comes through it to a file first"),
        (path(""), "is a directory"),
        ("/dev/null".to_owned(), "is a character device"),
        (path("empty"), "is empty"),
        (path("none"), "cannot open"),
    ] {
        for verb in GUEST_VERBS {
            // A FIFO without a writer would be waited for: the deadline ends the process.
            let mut child = kvmmem(&[verb, "--file", &name]).spawn().unwrap();
            let deadline = Instant::now() + Duration::from_secs(60);
            while child.try_wait().unwrap().is_none() {
                if Instant::now() > deadline {
                    child.kill().unwrap();
                }
                std::thread::sleep(Duration::from_millis(1));
            }
            let (code, stdout, stderr) = texts(child.wait_with_output().unwrap());
            assert_eq!((code, stdout.as_str()), (Some(1), ""), "{verb} {name}: {stderr}");
            assert!(stderr.contains(words) && stderr.contains(&name), "{verb} {name}: {stderr}");
        }
    }
}

#[test]
fn a_large_raw_dump_without_its_record_is_told_from_one_without_linux() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("big.raw");
    let file = std::fs::File::create(&path).unwrap();
    let info = |name: &Path| run(&["info", "--file", name.to_str().unwrap()]);
    for (len, hints) in [(1 << 30, false), (5 << 30, true)] {
        file.set_len(len).unwrap();
        let (code, stdout, stderr) = info(&path);
        assert_eq!((code, stdout.as_str()), (Some(1), ""));
        assert_eq!(stderr.contains("big.raw.json") && stderr.contains("kvmmem dump"), hints, "{stderr}");
        assert!(stderr.contains("there is no VMCOREINFO note"), "{stderr}");
    }
}
