// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Linux guests in dump files and in a target's memory, in which a builder wrote a kernel, and the
//! command line as a user runs it: what it prints about them, and its errors where they cannot be
//! read.

mod common;
#[path = "../../kvmmem-linux/tests/common/mod.rs"]
mod guest;

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kvmmem_client::vmm::{Region, VcpuAnswer, VcpuQuestion, VcpuRegisters, Vcpus};

use common::{Ended, Host, finish, wait_for};
use guest::{BTF, Guest, KALLSYMS, PAGE_TABLES, Place, RAM, objects, processes};
use rustix::fs::{Mode, OFlags, open};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};
use serde_json::{Value, json};

fn kvmmem(arguments: &[&str]) -> Ended {
    let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmem"));
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for variable in
        ["KVMMEM_KVMI_PORT", "KVMMEM_TOKEN", "KVMMEM_BROKER", "RUST_LOG", "CLICOLOR_FORCE"]
    {
        command.env_remove(variable);
    }
    finish(command.spawn().unwrap())
}

/// Writes a guest's memory, or its first `len` bytes, to a raw dump.
fn dump(folder: &Path, guest: &Guest, len: usize) -> String {
    let path = folder.join("web-1.raw");
    std::fs::write(&path, guest.bytes(0, len)).unwrap();
    path.to_str().unwrap().to_owned()
}

/// The error of a verb for a dump that cannot be read: nothing on standard output, one line on
/// standard error.
#[track_caller]
fn refused(verb: &str, file: &str) -> String {
    let ended = kvmmem(&[verb, "--file", file]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{verb}: {}", ended.stderr);
    assert!(ended.stderr.starts_with(&format!("error: {file}")), "{verb}: {}", ended.stderr);
    assert_eq!(ended.stderr.lines().count(), 1, "{verb}: {}", ended.stderr);
    ended.stderr
}

#[test]
fn a_guest_that_is_not_linux_is_named_with_what_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = dump(folder.path(), &Guest::default(), RAM);
    for verb in ["ps", "modules", "dmesg", "info"] {
        let error = refused(verb, &file);
        assert!(
            error.contains("no Linux kernel was found") && error.contains("kvmmem read"),
            "{error}"
        );
    }
    // Code 1 of a search means that it found nothing.
    for (arguments, code) in [(&["read", "0", "1"][..], 1), (&["strings"], 1), (&["scan", "00"], 2)]
    {
        let ended = kvmmem(&[arguments, &["--pid", "1", "--file", &file]].concat());
        assert_eq!(ended.code, Some(code), "{arguments:?}");
        assert!(ended.stderr.starts_with(&format!("error: {file}: no Linux")), "{}", ended.stderr);
    }
}

#[test]
fn a_kernel_without_types_is_named_with_what_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::with(&[Place::FIRST]);
    // Another name.
    let symbols = guest.bytes(Place::FIRST.gpa + KALLSYMS, 0x4_0000);
    let at = symbols.windows(11).position(|name| name == b"__start_BTF").unwrap();
    guest.put(Place::FIRST.gpa + KALLSYMS + at as u64, b"__start_XTF");
    let file = dump(folder.path(), &guest, RAM);
    for verb in ["ps", "files", "mounts"] {
        let error = refused(verb, &file);
        assert!(
            error.contains("CONFIG_DEBUG_INFO_BTF") && error.contains("kvmmem dmesg"),
            "{error}"
        );
    }
    let error = refused("modules", &file);
    assert!(error.contains("no symbol modules; data symbols need CONFIG_KALLSYMS_ALL"), "{error}");
    // They are there, and make no sense.
    let guest = Guest::with(&[Place::FIRST]);
    guest.put(Place::FIRST.gpa + BTF, &[0; 64]);
    let error = refused("ps", &dump(folder.path(), &guest, RAM));
    assert!(error.contains("the kernel's types cannot be read: "), "{error}");
}

#[test]
fn a_kernel_without_symbols_is_named_with_what_reads_it() {
    let folder = tempfile::tempdir().unwrap();
    let guest = Guest::with(&[Place { layout: guest::Layout::BeforeNames, ..Place::FIRST }]);
    guest.put(Place::FIRST.gpa + KALLSYMS, &[0; 0x4_0000]);
    let file = dump(folder.path(), &guest, RAM);
    for verb in ["ps", "modules", "sockets"] {
        let error = refused(verb, &file);
        assert!(error.contains("CONFIG_KALLSYMS") && error.contains("kvmmem dmesg"), "{error}");
    }
}

#[test]
fn a_dump_that_was_cut_short_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let guest = processes::guest();
    let file = dump(folder.path(), &guest, RAM);
    let whole = kvmmem(&["ps", "--file", &file]);
    assert_eq!((whole.code, whole.stdout.lines().count()), (Some(0), 4), "{}", whole.stderr);
    // The note is there, and the processes are not.
    let note = guest.bytes(Place::FIRST.note, 0x1000);
    guest.put(0x1000, &note);
    let file = dump(folder.path(), &guest, usize::try_from(Place::FIRST.gpa).unwrap() + 0x20_0000);
    let ended = kvmmem(&["ps", "--file", &file]);
    assert_eq!((ended.code, ended.stdout.as_str()), (Some(1), ""), "{}", ended.stderr);
    let first = ended.stderr.lines().next().unwrap();
    assert!(
        first.starts_with(&format!("error: {file} is damaged, or was cut short")),
        "{}",
        ended.stderr
    );
    // A record beside it has the size that there should be.
    let record = r#"{"format":"raw","ranges":[{"gpa":"0x0","len":16777216}]}"#;
    std::fs::write(folder.path().join("web-1.raw.json"), record).unwrap();
    let error = refused("ps", &file);
    assert!(error.contains("cut short") && error.contains("0x1000000"), "{error}");
}

#[test]
fn a_guest_that_is_restarted_under_ps_ends_it_with_its_name() {
    let host = Host::start(&[Region { gpa: 0, len: RAM as u64, offset: 0, file: 0 }]);
    let ram = File::from(host.ram.fd().try_clone_to_owned().unwrap());
    ram.write_all_at(&processes::guest().bytes(0, RAM), 0).unwrap();
    let arguments = ["ps", "--target", "victim", "--watch", "--interval", "1ms"];
    let mut child = host.command(&arguments).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let first = std::thread::spawn(move || {
        let mut line = String::new();
        lines.read_line(&mut line).unwrap();
        (line, lines)
    });
    // It has looked once it prints what has changed since.
    let start = Place::FIRST.gpa + processes::task(3) + processes::START;
    let mut times = 1_000_000_u64..;
    wait_for(Path::new("a change to be seen"), |_| {
        ram.write_all_at(&times.next().unwrap().to_le_bytes(), start).unwrap();
        first.is_finished()
    });
    let (line, lines) = first.join().unwrap();
    assert!(line.contains("ended") || line.contains("started"), "{line}");
    let next = Guest::with(&[Place::SECOND]);
    ram.write_all_at(&next.bytes(0, RAM), 0).unwrap();
    // What it prints meanwhile.
    lines.lines().for_each(drop);
    let ended = finish(child);
    assert_eq!(ended.code, Some(4), "{}", ended.stderr);
    let line = "error: victim: the guest was restarted while it was read: run the command again\n";
    assert_eq!(ended.stderr, line);
}

#[test]
fn a_kernel_without_a_note_has_the_same_rows() {
    let folder = tempfile::tempdir().unwrap();
    let guest = processes::guest();
    let file = dump(folder.path(), &guest, RAM);
    let with_note = kvmmem(&["ps", "--file", &file]);
    guest.put(Place::FIRST.note, &[0xff; 0x1000]);
    let file = dump(folder.path(), &guest, RAM);
    let table = format!("{:#x}", Place::FIRST.gpa + PAGE_TABLES);
    for more in [&[][..], &["--kernel", &table]] {
        let ended = kvmmem(&[&["ps", "--file", &file], more].concat());
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
        assert_eq!(ended.stdout, with_note.stdout);
    }
    let ended = kvmmem(&["info", "--file", &file, "--json"]);
    let info: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(
        (&info["note"], &info["cr3"]),
        (&serde_json::Value::Null, &table.into()),
        "{}",
        ended.stderr
    );
    let ended = kvmmem(&["ps", "--file", &file, "--kernel", "0x3000"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.stderr.contains("the address space of CR3 0x3000: leave --kernel out"),
        "{}",
        ended.stderr
    );
}

#[test]
fn of_several_kernels_each_is_named_with_the_command_that_chooses_it() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (Place::FIRST, Place::SECOND);
    let guest = Guest::with(&[first, second]);
    let build = |file: &str, more: &[&str]| {
        let ended = kvmmem(&[&["info", "--file", file, "--json"], more].concat());
        let info: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap_or_default();
        (info["cr3"].as_str().map(str::to_owned), ended.stderr)
    };
    let table = |place: Place| format!("{:#x}", place.gpa + PAGE_TABLES);
    let notes = [first, second].map(|place| (place, format!("--note {:#x}", place.note)));
    let tables = [first, second].map(|place| (place, format!("--kernel {}", table(place))));
    for options in [notes, tables] {
        let file = dump(folder.path(), &guest, RAM);
        let (none, error) = build(&file, &[]);
        assert_eq!(none, None, "{error}");
        assert!(error.contains(&format!("{file}: several Linux kernels were found")), "{error}");
        for (place, option) in &options {
            assert!(
                error.contains(&format!("kvmmem info --file {file} --json {option}")),
                "{error}"
            );
            let option: Vec<&str> = option.split(' ').collect();
            assert_eq!(build(&file, &option).0, Some(table(*place)));
            // A core has the vCPU's CR3, which decides.
            let core = core(folder.path(), &guest, place.gpa + PAGE_TABLES);
            assert_eq!(build(&core, &[]).0, Some(table(*place)));
        }
        [first, second].iter().for_each(|place| guest.put(place.note, &[0; 0x1000]));
    }
    let ended = kvmmem(&["info", "--file", "x", "--note", "0", "--kernel", "0"]);
    assert_eq!(ended.code, Some(2), "{}", ended.stderr);
}

/// Writes a guest's memory to an ELF core as QEMU does, with the registers of one vCPU.
fn core(folder: &Path, guest: &Guest, cr3: u64) -> String {
    let words =
        |words: &[u64]| words.iter().flat_map(|word| word.to_le_bytes()).collect::<Vec<u8>>();
    let halves =
        |halves: &[u32]| halves.iter().flat_map(|half| half.to_le_bytes()).collect::<Vec<u8>>();
    let mut state = [halves(&[1, 440]), vec![0; 432]].concat();
    state[416..424].copy_from_slice(&cr3.to_le_bytes());
    // A note of another kind comes first.
    let notes = [
        halves(&[5, 3, 1]),
        b"CORE\0\0\0\0abc\0".to_vec(),
        halves(&[5, 440, 0]),
        b"QEMU\0\0\0\0".to_vec(),
        state,
    ]
    .concat();
    let (headers, len) = (64 + 2 * 56, notes.len() as u64);
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0\x01\0\0\0".to_vec();
    file.extend(words(&[0, 64, 0]));
    file.extend(b"\0\0\0\0\x40\0\x38\0\x02\0\0\0\0\0\0\0");
    file.extend([halves(&[4, 0]), words(&[headers, 0, 0, len, len, 0])].concat());
    let ram = RAM as u64;
    file.extend([halves(&[1, 7]), words(&[headers + len, 0, 0, ram, ram, 0])].concat());
    file.extend(notes);
    file.extend(guest.bytes(0, RAM));
    let path = folder.join("web-1.elf");
    std::fs::write(&path, file).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A VMM whose vCPUs have this MSR_LSTAR each.
struct Vmm(Vec<u64>);

impl Vcpus for Vmm {
    fn answer(&self, _: VcpuQuestion) -> VcpuAnswer {
        let registers = |lstar: &u64| VcpuRegisters {
            cr0: 0x8005_0033,
            cr4: 0x6f0,
            efer: Some(0xd01),
            lstar: Some(*lstar),
            ..VcpuRegisters::default()
        };
        VcpuAnswer::Registers { vcpus: self.0.iter().map(registers).collect(), more: false }
    }

    fn resume_all(&self) {}

    fn expire(&self) -> Option<Duration> {
        None
    }
}

#[test]
fn where_each_vcpu_enters_the_kernel_is_checked_if_the_vmm_shows_it() {
    let place = Place::FIRST;
    let guest = objects::guest(&place);
    let regions = [Region { gpa: 0, len: RAM as u64, offset: 0, file: 0 }];
    let fill = |host: &Host| {
        let ram = File::from(host.ram.fd().try_clone_to_owned().unwrap());
        ram.write_all_at(&guest.bytes(0, RAM), 0).unwrap();
    };
    let row = |ended: &Ended| {
        let rows = ended.stdout.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        rows.into_iter().find(|row| row["check"] == "lstar").unwrap()
    };
    let entry = place.gva + 0xe000;
    for (lstars, code, found) in [([entry, entry], 0, 0), ([entry, entry + 1], 3, 1)] {
        let vmm = Arc::new(Vmm(lstars.to_vec()));
        let host = Host::start_answering(&regions, &vmm);
        fill(&host);
        let ended = host.run(&["check", "--target", "victim", "--json"]);
        assert_eq!(ended.code, Some(code), "{}", ended.stderr);
        assert_eq!(row(&ended), json!({"check": "lstar", "examined": 2, "found": found}));
        assert_eq!(ended.stdout.contains("MSR_LSTAR of vCPU 1"), found == 1, "{}", ended.stdout);
        // A token opens memory without registers.
        let ended = host.look(&[], &["check"]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert!(
            ended.stdout.contains("lstar was not checked: a token opens memory alone"),
            "{}",
            ended.stdout
        );
    }
    let host = Host::start(&regions);
    fill(&host);
    let folder = tempfile::tempdir().unwrap();
    let file = dump(folder.path(), &guest, RAM);
    for (ended, words) in [
        (host.run(&["check", "--target", "victim", "--json"]), "its VMM does not answer"),
        (kvmmem(&["check", "--file", &file, "--json"]), "a dump file does not have it"),
    ] {
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let row = row(&ended);
        assert_eq!((&row["examined"], &row["found"]), (&Value::Null, &json!(0)));
        let reason = row["not_checked"].as_str().unwrap();
        assert!(reason.contains(words) && reason.contains("--lstar ADDRESS"), "{reason}");
    }
    let ended = kvmmem(&["check", "--file", &file, "--json", "--lstar", &format!("{entry:#x}")]);
    assert_eq!(row(&ended), json!({"check": "lstar", "examined": 1, "found": 0}));
}

#[test]
fn the_core_of_a_process_in_a_dump_file_names_the_file_where_there_is_none() {
    let folder = tempfile::tempdir().unwrap();
    let file = dump(folder.path(), &Guest::default(), RAM);
    let core = folder.path().join("core").to_str().unwrap().to_owned();
    let ended = kvmmem(&["dump", &core, "--pid", "1", "--file", &file]);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    assert!(ended.stderr.starts_with(&format!("error: {file}: no Linux")), "{}", ended.stderr);
    assert!(!Path::new(&core).exists());
    for wrong in [
        &["dump", &core, "--file", &file][..],
        &["dump", &core, "--pid", "1", "--file", &file, "--target", "web-1"],
        &["dump", &core, "--pid", "1", "--file", &file, "--pause"],
        &["dump", &core, "--kernel", "0x1000"],
        &["dump", &core, "--pid", "1", "--file", &file, "--kernel", "0x1000", "--note", "0x1000"],
    ] {
        assert_eq!(kvmmem(wrong).code, Some(2), "{wrong:?}");
    }
}

/// A terminal of 100 columns: its two ends.
fn terminal() -> (File, File) {
    let terminal = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    grantpt(&terminal).unwrap();
    unlockpt(&terminal).unwrap();
    let name = ptsname(&terminal, Vec::new()).unwrap();
    let screen =
        open(name, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty()).unwrap();
    tcsetwinsize(&screen, Winsize { ws_row: 20, ws_col: 100, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    (terminal.into(), screen.into())
}

#[test]
fn a_terminal_shows_processes_in_a_table_and_is_restored() {
    let host = Host::start(&[Region { gpa: 0, len: RAM as u64, offset: 0, file: 0 }]);
    let ram = File::from(host.ram.fd().try_clone_to_owned().unwrap());
    ram.write_all_at(&processes::guest().bytes(0, RAM), 0).unwrap();
    // A name that would clear the screen.
    ram.write_all_at(
        b"\x1b[2J\x1b[31mevil\0\0\0",
        Place::FIRST.gpa + processes::task(3) + processes::COMM,
    )
    .unwrap();
    for end in ["q", "\x03", "SIGTERM", "SIGQUIT"] {
        let (mut terminal, screen) = self::terminal();
        let before = tcgetattr(&screen).unwrap();
        let mut command =
            host.command(&["ps", "--target", "victim", "--watch", "--interval", "5ms"]);
        let ends = [screen.try_clone().unwrap(), screen.try_clone().unwrap()];
        let [stdin, stdout] = ends;
        let mut child =
            command.stdin(stdin).stdout(stdout).env("TERM", "xterm-256color").spawn().unwrap();
        drop(command);
        let shown = Arc::new(Mutex::new(Vec::new()));
        let reader = std::thread::spawn({
            let (shown, mut terminal) = (Arc::clone(&shown), terminal.try_clone().unwrap());
            move || {
                let mut buffer = [0; 4096];
                // An error once the other end is closed.
                while let Ok(count @ 1..) = terminal.read(&mut buffer) {
                    shown.lock().unwrap().extend_from_slice(&buffer[..count]);
                }
            }
        });
        let has = |text: &str| {
            let shown = shown.lock().unwrap();
            shown.windows(text.len()).any(|part| part == text.as_bytes())
        };
        wait_for(Path::new("the processes to be shown"), |_| has("kthreadd") && has("COMMAND"));
        assert!(!tcgetattr(&screen).unwrap().local_modes.contains(LocalModes::ICANON), "{end}");
        // The process starts anew.
        let start = Place::FIRST.gpa + processes::task(2) + processes::START;
        ram.write_all_at(&7_000_000_000_u64.to_le_bytes(), start).unwrap();
        wait_for(Path::new("the start to be shown"), |_| has("1 started") || has("7.00"));
        match end {
            "SIGTERM" => common::signal(&child, Signal::TERM),
            "SIGQUIT" => common::signal(&child, Signal::QUIT),
            key => terminal.write_all(key.as_bytes()).unwrap(),
        }
        let status = child.wait().unwrap();
        assert_eq!(status.code(), Some(0), "{end:?}");
        let after = tcgetattr(&screen).unwrap();
        assert_eq!(
            (after.local_modes, after.output_modes),
            (before.local_modes, before.output_modes),
            "{end:?}"
        );
        drop(screen);
        reader.join().unwrap();
        let shown = shown.lock().unwrap();
        let text = String::from_utf8_lossy(&shown);
        // The alternate screen is entered and left, and nothing of the guest's does anything.
        assert!(
            text.contains("\x1b[?1049h")
                && text.contains("\x1b[?1049l")
                && text.contains("\x1b[?25h"),
            "{text:?}"
        );
        assert!(text.contains("\\u{1b}[2J") && !text.contains("\x1b[31mevil"), "{text:?}");
    }
}

#[test]
fn a_guest_whose_vmm_ends_under_ps_is_said_to_have_ended() {
    let mut host = Host::start(&[Region { gpa: 0, len: RAM as u64, offset: 0, file: 0 }]);
    let ram = File::from(host.ram.fd().try_clone_to_owned().unwrap());
    ram.write_all_at(&processes::guest().bytes(0, RAM), 0).unwrap();
    let arguments = ["ps", "--target", "victim", "--watch", "--interval", "1ms"];
    let child = host.command(&arguments).spawn().unwrap();
    wait_for(Path::new("the view"), |_| host.ask(&["grant", "list"]).contains("view 1"));
    drop(host.vm.take());
    let ended = finish(child);
    assert_eq!(ended.code, Some(1), "{}", ended.stderr);
    let line = "error: victim: the virtual machine has ended, or the broker has\n";
    assert_eq!(ended.stderr, line);
}

/// A guest in which the last process, 77, has a second thread, 78.
fn with_a_thread() -> Guest {
    const SIGNALS: u64 = 0x22_0000;
    const THREAD: u64 = 0x22_1000;
    const NODE: u64 = 16;
    const SIGNAL: u64 = 32;
    let guest = processes::guest();
    let Place { gpa, gva, .. } = Place::FIRST;
    guest.put(gpa + THREAD, &guest.bytes(gpa + processes::task(3), 0x100));
    guest.put(gpa + THREAD + processes::PID, &78_u32.to_le_bytes());
    for (n, offset) in (0..4).zip((SIGNALS..).step_by(0x100)) {
        let (task, signal) = (processes::task(n), offset);
        guest.put_word(gpa + task + SIGNAL, gva + signal);
        let mut nodes = vec![signal, task + NODE];
        if n == 3 {
            nodes.push(THREAD + NODE);
            guest.put_word(gpa + THREAD + SIGNAL, gva + signal);
        }
        for (at, node) in nodes.iter().enumerate() {
            let next = nodes[(at + 1) % nodes.len()];
            guest.put_word(gpa + node, gva + next);
            guest.put_word(gpa + next + 8, gva + node);
        }
    }
    guest
}

#[test]
fn a_number_that_is_no_process_has_a_next_step() {
    let folder = tempfile::tempdir().unwrap();
    let file = dump(folder.path(), &with_a_thread(), RAM);
    let last = 77;
    let core = folder.path().join("core").to_str().unwrap().to_owned();
    for (number, words) in [
        (last + 1, format!("{} is a thread of process {last}: give {last} instead", last + 1)),
        (99_999, format!("has no process 99999; its processes: kvmmem ps --file {file}")),
    ] {
        let number = number.to_string();
        for verb in [
            &["read", "0", "1", "--pid", &number][..],
            &["translate", "0", "--pid", &number],
            &["strings", "--pid", &number],
            &["dump", &core, "--pid", &number],
            &["maps", &number],
        ] {
            let ended = kvmmem(&[verb, &["--file", file.as_str()][..]].concat());
            assert_eq!(ended.code, Some(1), "{verb:?}: {}", ended.stderr);
            assert!(ended.stderr.contains(&words), "{verb:?}: {}", ended.stderr);
        }
    }
}

#[test]
fn a_table_ends_when_its_terminal_is_closed() {
    let host = Host::start(&[Region { gpa: 0, len: RAM as u64, offset: 0, file: 0 }]);
    let ram = File::from(host.ram.fd().try_clone_to_owned().unwrap());
    ram.write_all_at(&processes::guest().bytes(0, RAM), 0).unwrap();
    let (mut terminal, screen) = terminal();
    // Long enough for the terminal to be closed while keys are waited for.
    let mut command = host.command(&["ps", "--target", "victim", "--watch", "--interval", "1h"]);
    command.stdin(screen.try_clone().unwrap()).stdout(screen).env("TERM", "xterm-256color");
    let mut child = command.spawn().unwrap();
    drop(command);
    let mut shown = Vec::new();
    while !shown.windows(7).any(|part| part == b"COMMAND") {
        let mut buffer = [0; 4096];
        let count = terminal.read(&mut buffer).unwrap();
        shown.extend_from_slice(&buffer[..count]);
    }
    drop(terminal);
    wait_for(Path::new("the command to end"), |_| child.try_wait().unwrap().is_some());
}
