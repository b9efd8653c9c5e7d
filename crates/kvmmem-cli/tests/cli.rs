// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command line as a user meets it: what it prints, where, and with which exit code.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

const UUID: [u8; 16] = [9; 16];

/// The command, apart from this process's environment and terminal.
fn kvmmem(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmem"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for variable in
        ["KVMMEM_KVMI_PORT", "KVMMEM_DEVICE", "RUST_LOG", "KVMMEM_BROKER", "KVMMEM_TOKEN", "CLICOLOR_FORCE"]
    {
        command.env_remove(variable);
    }
    command
}

fn run(arguments: &[&str]) -> (Option<i32>, String, String) {
    texts(kvmmem(arguments).output().unwrap())
}

fn texts(output: Output) -> (Option<i32>, String, String) {
    (
        output.status.code(),
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    )
}

#[test]
fn help_names_the_verbs_and_the_exit_codes() {
    let (code, stdout, _) = run(&["--help"]);
    assert_eq!(code, Some(0));
    for word in [
        "vm",
        "targets",
        "introspector",
        "qemu-args",
        "hook",
        "unhook",
        "doctor",
        "grant",
        "grants",
        "revoke",
        "policy",
        "attach",
        "ps",
        "sockets",
        "check",
        "maps",
        "mounts",
        "dmesg",
        "modules",
        "info",
        "dump",
        "scan",
        "strings",
        "watch",
        "translate",
        "read",
        "write",
        "map",
        "Exit codes:",
        "KVMMEM_KVMI_PORT",
        "KVMMEM_TOKEN",
        "KVMMEM_DOOR",
    ] {
        assert!(stdout.contains(word), "{word}: {stdout}");
    }
}

#[test]
fn a_wrong_command_line_names_what_is_wrong() {
    let cases: [(&[&str], &[&str]); 24] = [
        (&["ps", "--watch", "--file", "x"], &["--watch", "--file"]),
        (&["ps", "--count", "3", "--file", "x"], &["--count", "--file"]),
        (&["ps", "--count", "3", "--target", "x"], &["--watch"]),
        (&["info", "--all", "--target", "x"], &["--all", "--target"]),
        (&["read", "0", "0"], &["LEN", "at least 1 byte"]),
        (&["watch", "0", "0"], &["LEN", "at least 1 byte"]),
        (&["watch", "0", "2M"], &["LEN", "0x100000"]),
        (&["read", "0xffffffffffffffff", "2"], &["0x2 bytes", "pass the end"]),
        (&["watch", "0xffffffffffffffff", "2"], &["0x2 bytes", "pass the end"]),
        (&["map", "0x1001", "--watch"], &["0x1001", "multiple of 8"]),
        (&["target", "add"], &["--pid", "--qmp", "--libvirt"]),
        (&["scan", "MZ"], &["MZ", "--text"]),
        (&["introspector", "add"], &["--pid", "--qmp", "--libvirt"]),
        (&["dump", "x", "--range", "1M..3M", "--range", "2M..4M"], &["overlap"]),
        (&["translate", "0x1000", "ffffffff81000000"], &["write 0xffffffff81000000"]),
        (&[], &["Usage"]),
        (&["frobnicate"], &["frobnicate"]),
        (&["read", "zebra", "16"], &["zebra", "0x1000"]),
        (&["read", "0x1000", "16Q"], &["16Q"]),
        (&["write", "0x1000", "abc"], &["abc", "pairs"]),
        (&["read", "0", "1", "--listen", "tcp:1"], &["tcp:1", "vsock:PORT"]),
        (&["read", "0", "1", "--timeout", "0"], &["--timeout"]),
        (&["map", "0x10000000000000000"], &["too large", "0xffffffffffffffff"]),
        (&["map", "0", "--interval", "5"], &["--watch"]),
    ];
    for (arguments, words) in cases {
        let (code, _, stderr) = run(arguments);
        assert_eq!(code, Some(2), "{arguments:?}");
        for word in words {
            assert!(stderr.contains(word), "{arguments:?} {word}: {stderr}");
        }
    }
}

#[test]
fn a_wrong_command_line_is_json_where_json_is_wanted() {
    let cases: [(&[&str], &str); 7] = [
        (&[], "a verb is missing: see --help"),
        (&["target"], "a verb is missing: see --help"),
        (&["frobnicate"], "unrecognized subcommand 'frobnicate'"),
        (&["read"], "the following required arguments were not provided: <ADDRESS> <LEN>"),
        (&["read", "0", "0"], "invalid value '0' for '<LEN>': the length is 0; give at least 1 byte"),
        (&["target", "add"], "say which one: --pid, --qmp or --libvirt"),
        (&["scan", "00", "--range", "..2M", "--range", "1M.."], "overlap"),
    ];
    for (arguments, words) in cases {
        let (code, stdout, stderr) = run(&[arguments, &["--json"]].concat());
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{arguments:?}");
        let error: serde_json::Value = serde_json::from_str(&stderr).expect(&stderr);
        let text = error["error"].as_str().unwrap();
        assert!(text.contains(words), "{arguments:?}: {text}");
        assert_eq!(error["causes"].as_array().unwrap().len(), 0);
    }
    let (code, stdout, _) = run(&["read", "--help", "--json"]);
    assert!(code == Some(0) && stdout.contains("Usage"), "{stdout}");
}

#[test]
fn numbers_are_written_the_same_way_in_every_place() {
    // These fail later, for another reason.
    for arguments in [
        &["read", "1M", "1MiB"][..],
        &["write", "1G", "00"],
        &["watch", "0x1M", "4KiB"],
        &["translate", "2M", "1T", "0x10k"],
        &["map", "1M", "--watch", "--interval", "20ms", "--listen", "unix:/nonexistent/x"],
        &["map", "1M", "--watch", "--interval", "20", "--device", "/nonexistent/x"],
        &["read", "0", "1", "--timeout", "1m"],
        &["dump", "/nonexistent/x", "--range", "..1M", "--range", "1M..2MiB", "--range", "1G.."],
        &["grant", "x", "--ttl", "30d", "--range", "..1M", "--broker", "/nonexistent/x"],
    ] {
        let (code, _, stderr) = run(arguments);
        assert_eq!(code, Some(1), "{arguments:?}: {stderr}");
    }
}

#[test]
fn a_verb_without_a_token_names_the_ways_to_get_one() {
    let verbs: [&[&str]; 8] = [
        &["attach"],
        &["dump", "-"],
        &["scan", "00"],
        &["strings"],
        &["watch", "0", "1"],
        &["read", "0", "1"],
        &["write", "0", "00"],
        &["translate", "0", "0"],
    ];
    for arguments in verbs {
        let (code, _, stderr) = run(arguments);
        assert_eq!(code, Some(if arguments[0] == "scan" { 2 } else { 1 }), "{arguments:?}: {stderr}");
        for word in ["kvmmem grant NAME", "--target NAME", "--token-file", "KVMMEM_TOKEN"] {
            assert!(stderr.contains(word), "{arguments:?} {word}: {stderr}");
        }
    }
}

#[test]
fn a_machine_is_refused_by_the_option_that_is_wrong() {
    let cases: [(&[&str], i32, &[&str]); 8] = [
        (&["--kernel", "/nonexistent/bzImage"], 1, &["--kernel", "/nonexistent/bzImage", "No such file"]),
        (&["--kernel", "/dev/null", "--initrd", "/nonexistent/i"], 1, &["--initrd", "/nonexistent/i"]),
        (&["--kernel", "/dev/null", "--serial", "stdio", "--json"], 2, &["--json", "file:PATH"]),
        (&["--kernel", "/dev/null", "--memory", "4097"], 2, &["--memory", "4096"]),
        (&["--kernel", "/dev/null", "--cpus", "0"], 2, &["--cpus", "0"]),
        (&["--kernel", "/dev/null", "--cid", "2"], 2, &["--cid", "2"]),
        (&["--kernel", "/dev/null", "--hypercalls", "port"], 2, &["--introspector"]),
        (&["--initrd", "/dev/null"], 2, &["--kernel"]),
    ];
    for (arguments, exit, words) in cases {
        let (code, _, stderr) = run(&[&["vm"], arguments].concat());
        assert_eq!(code, Some(exit), "{arguments:?}: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "{arguments:?} {word}: {stderr}");
        }
    }
}

#[test]
fn an_error_is_told_with_its_causes() {
    let arguments = ["map", "0x1000", "--device", "/nonexistent/kvmmem"];
    let (code, stdout, stderr) = run(&arguments);
    assert_eq!((code, stdout.as_str()), (Some(1), ""));
    assert_eq!(
        stderr,
        "error: cannot open /nonexistent/kvmmem: is the module loaded (modprobe kvmmem), and does this VM's host \
         offer mapping? See kvmmem doctor\n  1: cannot open the device\n  2: No such file or directory (os error 2)\n"
    );

    let (code, _, stderr) = run(&[&["--json"], &arguments[..]].concat());
    assert_eq!(code, Some(1));
    let error: serde_json::Value = serde_json::from_str(&stderr).unwrap();
    assert_eq!(error["causes"].as_array().unwrap().len(), 2);
}

#[test]
fn a_tool_without_a_place_to_listen_is_told_both_ways() {
    let (code, _, stderr) = run(&["read", "0", "1"]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("--listen") && stderr.contains("KVMMEM_KVMI_PORT"), "{stderr}");

    let output = kvmmem(&["read", "0", "1"]).env("KVMMEM_KVMI_PORT", "many").output().unwrap();
    let (code, _, stderr) = texts(output);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("KVMMEM_KVMI_PORT") && stderr.contains("many"), "{stderr}");
}

#[test]
fn a_broker_that_is_not_there_is_named() {
    let cases: [&[&str]; 7] = [
        &["targets"],
        &["hook", "victim", "vsock:4:5000"],
        &["unhook", "victim", "unix:/x"],
        &["grant", "victim"],
        &["grants"],
        &["revoke", "1"],
        &["policy", "victim"],
    ];
    for arguments in cases {
        let (code, _, stderr) = run(&[arguments, &["--broker", "/nonexistent/broker.sock"]].concat());
        assert_eq!(code, Some(1), "{arguments:?}");
        assert!(stderr.contains("kvmmemd") && stderr.contains("/nonexistent/broker.sock"), "{stderr}");
    }
    let (code, _, stderr) = run(&["hook", "victim", "tcp:1"]);
    assert_eq!(code, Some(2));
    assert!(stderr.contains("tcp:1") && stderr.contains("vsock:CID:PORT"), "{stderr}");
}

#[test]
fn waiting_for_nobody_ends() {
    let dir = tempfile::tempdir().unwrap();
    let endpoint = format!("unix:{}", dir.path().join("tool.sock").display());
    let (code, _, stderr) = run(&["read", "0", "1", "--timeout", "1", "--listen", &endpoint]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("nobody connected") && stderr.contains("kvmmem hook"), "{stderr}");
}

#[test]
fn the_doctor_agrees_with_its_exit_code_in_both_roles_and_forms() {
    for role in ["auto", "host", "guest"] {
        let (code, stdout, stderr) = run(&["doctor", "--role", role, "--json"]);
        assert_eq!(stderr, "");
        let diagnosis: serde_json::Value = serde_json::from_str(&stdout).unwrap();
        let checks = diagnosis["checks"].as_array().unwrap();
        let uses = diagnosis["uses"].as_array().unwrap();
        let failed = uses.iter().all(|verdict| verdict["status"] == "fail");
        assert_eq!(diagnosis["usable"].as_bool(), Some(!failed));
        assert_eq!(code, Some(i32::from(failed)));
        for check in checks {
            assert_eq!(check["remedy"].is_null(), check["status"] == "ok", "{check}");
        }

        let (text_code, stdout, _) = run(&["doctor", "--role", role]);
        assert_eq!(text_code, code);
        assert!(!stdout.contains('\x1b'), "colours on a pipe");
        for check in checks {
            assert!(stdout.contains(check["name"].as_str().unwrap()), "{stdout}");
        }
        for verdict in uses {
            let what = verdict["use"].as_str().unwrap().replace('_', "-");
            let (code, _, _) = run(&["doctor", "--for", &what]);
            assert_eq!(code, Some(i32::from(verdict["status"] == "fail")), "{what}");
            for name in verdict["see"].as_array().unwrap() {
                assert!(
                    checks.iter().any(|check| check["name"] == *name && check["status"] != "ok"),
                    "{name}"
                );
            }
        }
    }
    // Looking at a host's machines takes nothing that a host may lack; the broker can be started.
    assert_eq!(run(&["doctor", "--for", "look"]).0, Some(0));
    assert_eq!(run(&["doctor", "--for", "look", "--role", "guest"]).0, Some(2));
}

/// Plays a VM's side with one page of memory at 0, until the tool hangs up; returns the page.
fn serve(path: &Path) -> Vec<u8> {
    let deadline = Instant::now() + Duration::from_secs(60);
    let mut stream = loop {
        match UnixStream::connect(path) {
            Ok(stream) => break stream,
            Err(error) => assert!(Instant::now() < deadline, "the tool does not listen: {error}"),
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    let mut hello = [0; 96];
    hello[..4].copy_from_slice(&96u32.to_le_bytes());
    hello[4..20].copy_from_slice(&UUID);
    stream.write_all(&hello).unwrap();
    stream.read_exact(&mut [0; 24]).unwrap();

    let mut memory: Vec<u8> = (0..4096u16).map(|i| i.to_le_bytes()[0]).collect();
    let mut header = [0; 8];
    while stream.read_exact(&mut header).is_ok() {
        let mut payload = vec![0; usize::from(u16::from_le_bytes([header[2], header[3]]))];
        stream.read_exact(&mut payload).unwrap();
        let word = |at: usize| u64::from_le_bytes(payload[at..at + 8].try_into().unwrap());
        let (mut err, mut data) = (0, Vec::new());
        match header[0] {
            2 => data.extend([1, 0, 0, 0, 0, 0, 0, 0]),
            17 | 18 => {
                let (start, size) = (usize::try_from(word(0)).unwrap(), usize::try_from(word(8)).unwrap());
                match memory.get_mut(start..start + size) {
                    None => err = -22,
                    Some(place) if header[0] == 17 => data.extend_from_slice(place),
                    Some(place) => place.copy_from_slice(&payload[16..]),
                }
            }
            id => panic!("unexpected command {id}"),
        }
        let size = u16::try_from(8 + data.len()).unwrap().to_le_bytes();
        let reply = [&header[..2], &size, &header[4..], &i32::to_le_bytes(err), &[0; 4], &data].concat();
        stream.write_all(&reply).unwrap();
    }
    memory
}

/// Runs a tool's verb against [`serve`].
fn with_target(arguments: &[&str]) -> ((Option<i32>, String, String), Vec<u8>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("tool.sock");
    let endpoint = format!("unix:{}", path.display());
    let child = kvmmem(arguments).args(["--listen", &endpoint]).spawn().unwrap();
    let memory = serve(&path);
    (texts(child.wait_with_output().unwrap()), memory)
}

#[test]
fn read_prints_a_dump_or_json() {
    let ((code, stdout, stderr), _) = with_target(&["read", "0x40", "20"]);
    assert_eq!((code, stderr.as_str()), (Some(0), ""));
    assert_eq!(
        stdout,
        "000000000040  40 41 42 43 44 45 46 47  48 49 4a 4b 4c 4d 4e 4f  |@ABCDEFGHIJKLMNO|\n\
         000000000050  50 51 52 53                                       |PQRS|\n"
    );
    let ((code, stdout, _), _) = with_target(&["--json", "read", "64", "0x4"]);
    assert_eq!((code, stdout.as_str()), (Some(0), "{\"gpa\":\"0x40\",\"hex\":\"40414243\"}\n"));
}

#[test]
fn read_of_a_hole_is_an_error_with_the_address() {
    let ((code, _, stderr), _) = with_target(&["read", "0x7000", "8"]);
    assert_eq!(code, Some(1));
    assert!(stderr.contains("gpa 0x7000") && stderr.contains("EINVAL"), "{stderr}");
}

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
fn translate_reads_tables_over_kvmi_too() {
    let ((code, stdout, stderr), _) = with_target(&["translate", "0", "8"]);
    assert_eq!((code, stderr.as_str()), (Some(3), ""));
    let entry = "the PML4E 0x706050403020100 at gpa 0x0 is not present";
    assert!(stdout.starts_with(&format!("0x0000000000000008  gva 0x8 is not mapped: {entry};")), "{stdout}");
}

#[test]
fn write_reaches_the_target() {
    let ((code, stdout, _), memory) = with_target(&["write", "0x10", "c0ffee"]);
    assert_eq!((code, stdout.as_str()), (Some(0), "wrote 3 bytes at 0x10\n"));
    assert_eq!(memory[0x0f..0x14], [0x0f, 0xc0, 0xff, 0xee, 0x13]);
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
        assert!(stderr.starts_with("error: no Linux kernel was found"), "{verb}: {stderr}");
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
