// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Verbs of a dump file.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::{kvmmem, run, texts};

/// A raw dump with tables of four levels at 0x1000, which map one page.
fn dump_with_tables(directory: &Path) -> String {
    let mut memory = vec![0; 0x8000];
    for (at, value) in [(0x1000, 0x2007_u64), (0x2000, 0x3007), (0x3000, 0x4007), (0x4008, 0x5007)]
    {
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
    for arguments in
        [&["translate", "0x1000", "0x1ff0"][..], &["translate", "--cr3", "0x1000", "0x1ff0"]]
    {
        let (code, stdout, stderr) = run(arguments);
        assert_eq!((code, stdout.as_str()), (Some(0), translated), "{stderr}");
    }
    assert_eq!(run(&["translate", "0x1000", "0x1ff0", "0x2000"]).0, Some(3));
    let (code, stdout, stderr) =
        run(&["watch", "0x5ff0", "16", "--count", "2", "--interval", "1ms"]);
    assert_eq!((code, stdout.lines().count()), (Some(0), 1), "{stderr}");
    // A dump without Linux has no processes and no kernel.
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
        (&["translate", "--pid", "1", "kernel"], "not a guest-virtual address"),
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
        assert!(
            stderr.starts_with(&format!("error: {file}: no Linux kernel was found")),
            "{verb}: {stderr}"
        );
        let (code, _, stderr) = run(&[verb, "--file", file, "--note", "0x1000"]);
        assert_eq!(code, Some(1));
        assert!(stderr.contains("0x1000"), "{verb}: {stderr}");
        let (code, _, stderr) = run(&[verb, "--file", file, "--target", "web-1"]);
        assert_eq!(code, Some(2), "{verb}: {stderr}");
    }
}

/// The verbs about Linux guests.
const GUEST_VERBS: [&str; 9] =
    ["ps", "maps", "mounts", "files", "sockets", "check", "dmesg", "modules", "info"];

#[test]
fn a_guest_verb_without_a_source_names_all_of_them() {
    for verb in GUEST_VERBS {
        let (code, stdout, stderr) = run(&[verb]);
        assert_eq!((code, stdout.as_str()), (Some(2), ""), "{verb}");
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
    rustix::fs::mknodat(rustix::fs::CWD, path("fifo"), rustix::fs::FileType::Fifo, mode, 0)
        .unwrap();
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
        assert_eq!(
            stderr.contains("big.raw.json") && stderr.contains("kvmmem dump"),
            hints,
            "{stderr}"
        );
        assert!(stderr.contains("neither a VMCOREINFO note nor page tables"), "{stderr}");
    }
}

/// An ELF core of the memory of a raw dump, with the registers of two vCPUs: the first one's paging
/// is off.
fn core_with_registers(raw: &str) -> String {
    let memory = std::fs::read(raw).unwrap();
    let mut notes = Vec::new();
    for (cr0, cr3, cr4) in [(0x6000_0010_u64, 0_u64, 0_u64), (0x8005_0033, 0x1000, 0x75_0eb0)] {
        notes.extend([5u32, 440, 0].into_iter().flat_map(u32::to_le_bytes));
        notes.extend(b"QEMU\0\0\0\0");
        let mut state = vec![0; 440];
        for (at, value) in [(0, 440 << 32 | 1), (392, cr0), (416, cr3), (424, cr4)] {
            state[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        notes.extend(state);
    }
    let mut core = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0\x01\0\0\0".to_vec();
    core.extend([0u64, 64, 0].into_iter().flat_map(u64::to_le_bytes));
    core.extend([0u16, 0, 64, 56, 2, 0, 0, 0].into_iter().flat_map(u16::to_le_bytes));
    let (at, notes_len, len) = (64 + 2 * 56, notes.len() as u64, memory.len() as u64);
    for (kind, words) in
        [(4u32, [at, 0, 0, notes_len, 0, 0]), (1, [at + notes_len, 0, 0, len, len, 0])]
    {
        core.extend([kind, 7].into_iter().flat_map(u32::to_le_bytes));
        core.extend(words.into_iter().flat_map(u64::to_le_bytes));
    }
    let path = format!("{raw}.core");
    std::fs::write(&path, [core, notes, memory].concat()).unwrap();
    path
}

#[test]
fn addresses_are_looked_up_in_the_tables_of_a_vcpu() {
    let directory = tempfile::tempdir().unwrap();
    let raw = dump_with_tables(directory.path());
    let core = core_with_registers(&raw);
    let of = |file: &str, arguments: &[&str]| run(&[arguments, &["--file", file]].concat());
    for (verb, expected) in [
        (&["read", "0x1ff0", "16", "--raw"][..], "end of the page!".to_owned()),
        (
            &["translate", "0x1ff0"],
            "0x0000000000001ff0  0x000000005ff0  4 KiB  rwx  user\n".to_owned(),
        ),
        (&["strings"], "000000001ff0  ascii  end of the page!\n".to_owned()),
    ] {
        let (code, stdout, stderr) = of(&core, &[verb, &["--vcpu", "1"]].concat());
        assert_eq!((code, stdout, stderr.as_str()), (Some(0), expected, ""), "{verb:?}");
    }
    let found = of(&core, &["scan", "--text", "of the page", "--vcpu", "1", "--json"]);
    assert_eq!((found.0, found.1.contains("\"gva\":\"0x1ff4\"")), (Some(0), true), "{found:?}");
    let watched =
        of(&core, &["watch", "0x1ff0", "16", "--vcpu", "1", "--count", "2", "--interval", "1ms"]);
    assert_eq!((watched.0, watched.1.contains("end of the page!")), (Some(0), true), "{watched:?}");
    // What is not in the tables is as with --cr3.
    assert_eq!(of(&core, &["translate", "--vcpu", "1", "0x2000"]).0, Some(3));
    let wrong: [(&str, &str, &[&str]); 4] = [
        (&core, "2", &["there is no vCPU 2: the last one is 1"]),
        (&core, "0", &["vCPU 0", "paging is off (CR0 0x60000010)"]),
        (&raw, "0", &["has no registers", "kvmmem dump --format elf", "--cr3 kernel"]),
        (&raw, "x", &["--vcpu"]),
    ];
    for (file, number, words) in wrong {
        for verb in [
            &["read", "0", "1"][..],
            &["watch", "0", "1", "--count", "1"],
            &["translate", "0"],
            &["scan", "00"],
            &["strings"],
        ] {
            let (code, stdout, stderr) = of(file, &[verb, &["--vcpu", number]].concat());
            let expected = if number == "x" || verb[0] == "scan" { 2 } else { 1 };
            assert_eq!((code, stdout.as_str()), (Some(expected), ""), "{verb:?}: {stderr}");
            assert!(words.iter().all(|word| stderr.contains(word)), "{verb:?}: {stderr}");
        }
    }
    for other in
        [&["--pid", "1"][..], &["--cr3", "0x1000"], &["--cr3", "kernel"], &["--levels", "4"]]
    {
        let arguments = [&["translate", "--vcpu", "1", "0x1ff0"], other].concat();
        assert_eq!(of(&core, &arguments).0, Some(2), "{other:?}");
    }
    // A connection over KVMI has no registers, and the command does not wait for one.
    let (code, _, stderr) =
        run(&["read", "--vcpu", "0", "0", "1", "--listen", "unix:/nonexistent/x"]);
    assert_eq!((code, stderr.contains("--target NAME")), (Some(1), true), "{stderr}");
}
