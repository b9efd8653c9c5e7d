// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `dump`.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use kvmmem_broker::link::{Change, Region};
use rustix::process::Signal;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::common::{Ended, Host, UUID, finish, signal, wait_for};
use crate::{LARGE, host, large};

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn path(host: &Host) -> PathBuf {
    host.path("dump")
}

fn dump(host: &Host, grant: &[&str], arguments: &[&str]) -> Ended {
    host.look(grant, &[&["dump", path(host).to_str().unwrap()], arguments].concat())
}

/// A dump that has begun.
fn begin(host: &Host, token: &str) -> Child {
    let path = path(host);
    let child = host.view(token, &["dump", path.to_str().unwrap()]).spawn().unwrap();
    // Something of it is written.
    wait_for(&path, |path| fs::metadata(path).is_ok_and(|file| file.len() > 1 << 20));
    child
}

fn part(host: &Host) -> PathBuf {
    host.path("dump.part")
}

#[track_caller]
fn is_whole(host: &Host, file: &Path) {
    let (mut wanted, mut found) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let (ram, file) = (File::from(host.ram.fd().try_clone_to_owned().unwrap()), File::open(file).unwrap());
    for offset in (0..LARGE[0].len).step_by(1 << 20) {
        ram.read_exact_at(&mut wanted, offset).unwrap();
        file.read_exact_at(&mut found, offset).unwrap();
        assert!(wanted == found, "the dump is wrong at {offset:#x}");
    }
}

#[test]
fn a_raw_dump_has_each_byte_at_its_address_and_keeps_the_holes() {
    let host = host();
    for place in [0, (4 << 20) - 2, (16 << 20) + 0x5000, (20 << 20) - 4] {
        host.put(place, b"data");
    }
    let before = host.allocated();
    let ended = dump(&host, &[], &["--json"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let summary: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&summary["bytes"], &summary["resumed"]), (&(20 << 20).into(), &false.into()));
    assert_eq!(host.allocated(), before, "the dump inflates the target");

    let file = fs::read(path(&host)).unwrap();
    let mut wanted = vec![0; 20 << 20];
    for place in [0, (4 << 20) - 2, (16 << 20) + 0x5000, (20 << 20) - 4] {
        wanted[place..place + 4].copy_from_slice(b"data");
    }
    assert!(file == wanted);
    let metadata = fs::metadata(path(&host)).unwrap();
    assert!(metadata.blocks() * 512 < 1 << 20, "{} blocks", metadata.blocks());
    assert_eq!(metadata.mode() & 0o777, 0o600);
    assert!(!part(&host).exists());
}

#[test]
fn an_elf_core_has_a_segment_for_each_range() {
    let host = host();
    host.put((4 << 20) - 2, b"data");
    host.put((16 << 20) + 0x5000, b"more");
    let ended = dump(&host, &[], &["--format", "elf", "--range", "3M..5M", "--range", "16M..17M"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let file = fs::read(path(&host)).unwrap();
    let word = |at: usize, size: usize| {
        file[at..at + size].iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte))
    };
    assert_eq!(&file[..8], b"\x7fELF\x02\x01\x01\x00");
    // ET_CORE, EM_X86_64, the program headers' place, size and number.
    assert_eq!((word(16, 2), word(18, 2), word(32, 8), word(54, 2), word(56, 2)), (4, 62, 64, 56, 4));
    // PT_NOTE first; this target has no kernel, so no note.
    assert_eq!((word(64, 4), word(64 + 32, 8)), (4, 0));
    let mut found = Vec::new();
    for header in (64 + 56..).step_by(56).take(3) {
        let [offset, _, paddr, filesz, memsz, align] = [8, 16, 24, 32, 40, 48].map(|at| word(header + at, 8));
        assert_eq!((word(header, 4), filesz, align), (1, memsz, 0));
        assert_eq!((offset % 0x1000, paddr % 0x1000), (0, 0));
        let at = usize::try_from(offset).unwrap();
        found.push((paddr, &file[at..at + usize::try_from(filesz).unwrap()]));
    }
    let places: Vec<(u64, usize)> = found.iter().map(|(gpa, bytes)| (*gpa, bytes.len())).collect();
    assert_eq!(places, [(3 << 20, 1 << 20), (4 << 20, 1 << 20), (16 << 20, 1 << 20)]);
    assert_eq!((&found[0].1[(1 << 20) - 2..], &found[1].1[..2]), (&b"da"[..], &b"ta"[..]));
    assert_eq!(&found[2].1[0x5000..0x5004], b"more");
}

#[test]
fn nothing_is_written_over() {
    let host = host();
    fs::write(path(&host), "mine").unwrap();
    let cases: [(&[&str], &str); 3] =
        [(&[], "remove it"), (&["--resume"], "complete or no dump"), (&["--range", "0..1M"], "remove it")];
    for (arguments, words) in cases {
        let ended = dump(&host, &[], arguments);
        assert_eq!(ended.code, Some(1));
        assert!(ended.stderr.contains(words), "{}", ended.stderr);
    }
    assert_eq!(fs::read(path(&host)).unwrap(), b"mine");
    fs::remove_file(path(&host)).unwrap();
    // Where nothing is begun, nothing has to be resumed.
    assert_eq!(dump(&host, &[], &["--resume"]).code, Some(0));
    fs::remove_file(host.path("dump.json")).unwrap();
    for (arguments, code, word) in [
        (["--range", "1M..3M", "--range", "2M..4M"], 2, "overlap"),
        (["--range", "8M..9M", "--format", "raw"], 1, "0x800000"),
    ] {
        fs::remove_file(path(&host)).ok();
        let ended = dump(&host, &[], &arguments);
        assert!(ended.code == Some(code) && ended.stderr.contains(word), "{}", ended.stderr);
        assert!(!path(&host).exists());
    }
}

#[test]
fn a_dump_is_stopped_by_revocation_and_goes_on_by_a_new_grant() {
    let host = large();
    let (grant, token) = host.grant(&[]);
    let child = begin(&host, &token);
    // A process that does not run cannot confirm that its view has ended. It runs for a moment after the signal was sent.
    signal(&child, Signal::STOP);
    let is_stopped = |thread: &Path| fs::read_to_string(thread.join("stat")).unwrap().contains(") T ");
    let threads = PathBuf::from(format!("/proc/{}/task", child.id()));
    wait_for(&threads, |threads| {
        fs::read_dir(threads).unwrap().all(|thread| is_stopped(&thread.unwrap().path()))
    });
    let revoked = host.run(&["revoke", &grant]);
    assert_eq!(revoked.code, Some(3), "{}", revoked.stderr);
    assert!(revoked.stdout.contains("(1 missing)"), "{}", revoked.stdout);
    signal(&child, Signal::CONT);
    let ended = finish(child);
    assert_eq!(ended.code, Some(1));
    for words in ["the dump stopped at gpa 0x", "--resume", "taken back"] {
        assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
    }
    assert!(part(&host).exists());

    let ended = dump(&host, &[], &[]);
    assert!(ended.code == Some(1) && ended.stderr.contains("--resume"), "{}", ended.stderr);
    let ended = dump(&host, &["--range", "0..64M"], &["--resume"]);
    assert!(ended.code == Some(1) && ended.stderr.contains("other ranges"), "{}", ended.stderr);
    let ended = dump(&host, &[], &["--resume", "--format", "elf"]);
    assert!(ended.code == Some(1) && ended.stderr.contains("--format"), "{}", ended.stderr);

    let ended = dump(&host, &[], &["--resume", "--json"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let summary: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((&summary["data_bytes"], &summary["resumed"]), (&LARGE[0].len.into(), &true.into()));
    is_whole(&host, &path(&host));
    assert!(!part(&host).exists());
}

#[test]
fn an_interrupted_dump_goes_on_unless_the_target_is_another_one() {
    let host = large();
    let child = begin(&host, &host.grant(&[]).1);
    signal(&child, Signal::INT);
    let ended = finish(child);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("interrupted") && ended.stderr.contains("--resume"), "{}", ended.stderr);

    let whole = fs::read_to_string(part(&host)).unwrap();
    fs::write(part(&host), whole.replace("00112233", "99112233")).unwrap();
    let ended = dump(&host, &[], &["--resume"]);
    assert!(ended.code == Some(1) && ended.stderr.contains("another target, 99112233"), "{}", ended.stderr);
    fs::write(part(&host), whole).unwrap();

    host.vm.as_ref().unwrap().ram_changed(LARGE.to_vec(), Change::Reset);
    let ended = dump(&host, &[], &["--resume"]);
    assert_eq!(ended.code, Some(1));
    for words in ["was reset, resized or started again", "begin again"] {
        assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
    }
}

#[test]
fn a_dump_goes_on_by_the_next_broker_but_not_with_the_next_run_of_the_target() {
    let mut host = large();
    let child = begin(&host, &host.grant(&[]).1);
    signal(&child, Signal::INT);
    assert_eq!(finish(child).code, Some(1));
    host.next_broker();
    let state = fs::read(part(&host)).unwrap();
    let half = host.path("half");
    fs::copy(path(&host), &half).unwrap();
    // The link says which run it is just after it has registered.
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let ended = dump(&host, &[], &["--resume"]);
        if ended.code == Some(0) {
            break;
        }
        assert!(Instant::now() < deadline && ended.stderr.contains("started again"), "{}", ended.stderr);
    }
    is_whole(&host, &path(&host));

    for file in ["dump", "dump.json"] {
        fs::remove_file(host.path(file)).unwrap();
    }
    fs::rename(half, path(&host)).unwrap();
    fs::write(part(&host), state).unwrap();
    host.restart_target();
    let ended = dump(&host, &[], &["--resume"]);
    assert_eq!(ended.code, Some(1));
    for words in ["was reset, resized or started again", "begin again"] {
        assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
    }
}

#[test]
fn a_record_lies_beside_the_file() {
    let host = host();
    host.put(0x1000, b"data");
    let ended = dump(&host, &[], &["--json"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let record: Value = serde_json::from_slice(&fs::read(host.path("dump.json")).unwrap()).unwrap();
    assert_eq!(record, serde_json::from_str::<Value>(&ended.stdout).unwrap());
    assert_eq!((&record["name"], &record["target"]), (&"victim".into(), &UUID.to_string().into()));
    let range = |gpa: u64, len: u64| json!({"gpa": format!("{gpa:#x}"), "len": len});
    assert_eq!(
        record["ranges"],
        json!([range(0, 4 << 20), range(4 << 20, 4 << 20), range(16 << 20, 4 << 20)])
    );
    assert_eq!(record["left_out"], json!([range(8 << 20, 8 << 20)]));
    assert_eq!((&record["unreadable"], &record["vmcoreinfo"]), (&json!([]), &Value::Null));
    assert!(
        record["instance"].as_u64() > Some(0) && record["started_ms"].as_u64() <= record["ended_ms"].as_u64()
    );
    let digest: String = hex(&Sha256::digest(fs::read(path(&host)).unwrap()));
    assert_eq!(record["sha256"], digest.as_str());

    fs::remove_file(path(&host)).unwrap();
    let ended = dump(&host, &[], &[]);
    assert!(ended.code == Some(1) && ended.stderr.contains("dump.json exists"), "{}", ended.stderr);
    let elsewhere = host.path("elsewhere");
    let ended = dump(&host, &[], &["--no-hash", "--record", elsewhere.to_str().unwrap(), "--format", "elf"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let record: Value = serde_json::from_slice(&fs::read(elsewhere).unwrap()).unwrap();
    assert_eq!((&record["sha256"], &record["format"]), (&Value::Null, &"elf".into()));
}

#[test]
fn a_complete_dump_whose_checkpoint_is_left_is_finished_without_a_token() {
    let host = large();
    let child = begin(&host, &host.grant(&[]).1);
    signal(&child, Signal::INT);
    assert_eq!(finish(child).code, Some(1));
    let checkpoint = fs::read(part(&host)).unwrap();
    let ended = dump(&host, &[], &["--resume", "--json"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    // As if the command had been killed after it wrote the record.
    fs::write(part(&host), &checkpoint).unwrap();
    let again = |more: &[&str]| {
        let path = path(&host);
        host.run(&[&["dump", path.to_str().unwrap(), "--resume", "--json"], more].concat())
    };
    let elsewhere = host.path("elsewhere");
    fs::write(&elsewhere, "mine").unwrap();
    let refused = again(&["--record", elsewhere.to_str().unwrap()]);
    assert!(refused.code == Some(1) && refused.stderr.contains("elsewhere exists"), "{}", refused.stderr);
    let finished = again(&[]);
    assert_eq!((finished.code, finished.stderr.as_str()), (Some(0), ""));
    let [said, before] = [&finished, &ended].map(|it| serde_json::from_str::<Value>(&it.stdout).unwrap());
    assert_eq!(said, before);
    assert!(!part(&host).exists());
    is_whole(&host, &path(&host));
    // The record of another dump does not make this one complete.
    let begun = String::from_utf8(checkpoint).unwrap();
    let other = begun.replace("\"started_ms\":1", "\"started_ms\":2");
    assert_ne!(begun, other);
    fs::write(part(&host), other).unwrap();
    let refused = again(&[]);
    assert!(refused.code == Some(1) && refused.stderr.contains("dump.json exists"), "{}", refused.stderr);
}

#[test]
fn an_interrupt_before_there_is_a_view_leaves_no_file() {
    let host = host();
    let (path, listen) = (path(&host), host.endpoint());
    let child = host.command(&["dump", path.to_str().unwrap(), "--listen", &listen]).spawn().unwrap();
    wait_for(&host.path("tool.sock"), Path::exists);
    signal(&child, Signal::INT);
    assert_ne!(finish(child).code, Some(0));
    assert!(!path.exists() && !part(&host).exists());
}

#[test]
fn the_digest_of_a_dump_that_went_on_is_of_the_whole_file() {
    let host = large();
    let child = begin(&host, &host.grant(&[]).1);
    signal(&child, Signal::INT);
    assert_eq!(finish(child).code, Some(1));
    assert!(!host.path("dump.json").exists());
    let ended = dump(&host, &[], &["--resume", "--json"]);
    let record: Value = serde_json::from_str(&ended.stdout).unwrap();
    let digest: String = hex(&Sha256::digest(fs::read(path(&host)).unwrap()));
    assert_eq!((&record["sha256"], &record["resumed"]), (&digest.as_str().into(), &true.into()));
}

#[test]
fn what_is_left_out_of_a_range_is_told() {
    let host = host();
    let ended = dump(&host, &[], &["--range", "7M..12M", "--json"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    assert!(ended.stderr.contains("0x800000..0xc00000 is left out"), "{}", ended.stderr);
    let record: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(record["left_out"], json!([{"gpa": "0x800000", "len": 4 << 20}]));
    // A range without an end has none that could be missing.
    for file in ["dump", "dump.json"] {
        fs::remove_file(host.path(file)).unwrap();
    }
    let ended = dump(&host, &[], &["--range", "16M.."]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
}

#[test]
fn memory_that_cannot_be_read_is_zeros_and_told() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(8 << 20).unwrap();
    for page in 0..2048u64 {
        file.write_all_at(&(page + 1).to_le_bytes().repeat(512), page * 0x1000).unwrap();
    }
    let host = Host::start_file(&[Region { gpa: 0, len: 8 << 20, offset: 0, file: 0 }], &file);
    let whole = 0x50_3000;
    file.set_len(whole).unwrap();
    for format in ["raw", "elf"] {
        let ended = dump(&host, &[], &["--format", format, "--json"]);
        assert_eq!(ended.code, Some(3), "{}", ended.stderr);
        let record: Value = serde_json::from_str(&ended.stdout).unwrap();
        assert_eq!(record["unreadable"], json!([{"gpa": "0x503000", "len": (8 << 20) - whole}]));
        assert_eq!(record["data_bytes"], whole);
        let dumped = fs::read(path(&host)).unwrap();
        let memory = &dumped[dumped.len() - (8 << 20)..];
        for (page, bytes) in (1u64..).zip(memory.chunks(0x1000)) {
            let expected =
                if page * 0x1000 <= whole { page.to_le_bytes().repeat(512) } else { vec![0; 0x1000] };
            assert!(bytes == expected, "page {page:#x}");
        }
        assert!(host.path("dump.json").exists() && !part(&host).exists());
        for file in ["dump", "dump.json"] {
            fs::remove_file(host.path(file)).unwrap();
        }
    }
    let ended = dump(&host, &[], &[]);
    assert_eq!(ended.code, Some(3));
    assert!(ended.stdout.contains("0x503000..0x800000"), "{}", ended.stdout);
}

#[test]
fn a_dump_goes_on_beyond_what_cannot_be_read() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(LARGE[0].len).unwrap();
    let page = vec![0x5a; 1 << 20];
    (0..LARGE[0].len).step_by(1 << 20).for_each(|at| file.write_all_at(&page, at).unwrap());
    let host = Host::start_file(&LARGE, &file);
    let child = begin(&host, &host.grant(&[]).1);
    signal(&child, Signal::INT);
    assert_eq!(finish(child).code, Some(1));
    let whole = LARGE[0].len - 0x20_0000;
    file.set_len(whole).unwrap();
    let ended = dump(&host, &[], &["--resume", "--json"]);
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    let record: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(record["unreadable"], json!([{"gpa": format!("{whole:#x}"), "len": 0x20_0000}]));
}

/// A dump to standard output, and what it says.
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
    let ended = finish(host.view(&token, &["dump", path(&host).to_str().unwrap()]).spawn().unwrap());
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    fs::remove_file(path(&host)).unwrap();
    fs::remove_file(host.path("dump.json")).unwrap();
    let (_, token) = host.grant(&[]);
    let ended = finish(host.view(&token, &["dump", "/dev/full"]).spawn().unwrap());
    assert!(ended.code == Some(1) && ended.stderr.contains("No space left"), "{}", ended.stderr);

    // A token that opens nothing leaves nothing behind.
    let ended = finish(host.view(&token, &["dump", path(&host).to_str().unwrap()]).spawn().unwrap());
    assert_eq!(ended.code, Some(1));
    assert!(!path(&host).exists() && !part(&host).exists());
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
        assert!(ended.code == Some(1) && ended.stderr.contains("is a terminal"), "{}", ended.stderr);
    }
}

#[test]
fn a_reader_that_leaves_ends_the_dump_with_a_reason() {
    let host = large();
    let mut child = host.view(&host.grant(&[]).1, &["dump", "-"]).spawn().unwrap();
    drop(child.stdout.take());
    let ended = finish(child);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("closed the pipe"), "{}", ended.stderr);
}

/// Puts a kernel into the target that has told its note, its page tables and its name: `at` is where, in 2 MiB.
fn put_kernel(host: &Host, at: u64, release: &str) -> String {
    let base = at << 21;
    let entry = |table: u64, index: u64, value: u64| host.put(base + table + index * 8, &value.to_le_bytes());
    entry(0x10_1000, 511, (base + 0x10_2000) | 1);
    entry(0x10_2000, 510, (base + 0x10_3000) | 1);
    entry(0x10_3000, 0, base | 1 << 7 | 1);
    host.put(base + 0x5000 + 4 + 130, release.as_bytes());
    let text = format!(
        "OSRELEASE={release}\nSYMBOL(init_uts_ns)=ffffffff80005000\nOFFSET(uts_namespace.name)=4\n\
         SYMBOL(swapper_pg_dir)=ffffffff80101000\nNUMBER(phys_base)={base}\nNUMBER(pgtable_l5_enabled)=0\n"
    );
    let len = u32::try_from(text.len()).unwrap();
    let note =
        [&[11, len, 0].map(u32::to_le_bytes).concat(), &b"VMCOREINFO\0\0"[..], text.as_bytes()].concat();
    host.put(base + 0x8000, &note);
    text
}

#[test]
fn an_elf_core_has_the_kernels_note_if_it_is_known_which() {
    let host = host();
    let elf = |words: &str| {
        let ended = dump(&host, &[], &["--format", "elf", "--json"]);
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        assert!(ended.stderr.contains(words), "{}", ended.stderr);
        let record: Value = serde_json::from_str(&ended.stdout).unwrap();
        let core = fs::read(path(&host)).unwrap();
        let size = usize::try_from(u64::from_le_bytes(core[96..104].try_into().unwrap())).unwrap();
        let at = usize::try_from(u64::from_le_bytes(core[72..80].try_into().unwrap())).unwrap();
        for file in ["dump", "dump.json"] {
            fs::remove_file(host.path(file)).unwrap();
        }
        (core[at..at + size].to_vec(), record["vmcoreinfo"].clone())
    };
    let text = put_kernel(&host, 2, "6.12.1-one");
    let (note, told) = elf("");
    assert!(note.starts_with(b"\x0b\0\0\0") && note[12..24] == *b"VMCOREINFO\0\0");
    assert_eq!(&note[24..24 + text.len()], text.as_bytes());
    assert_eq!(told, json!({"gpa": "0x408000", "release": "6.12.1-one"}));
    // A forged one does not fit, and harms nobody.
    let forged = put_kernel(&host, 1, "6.12.1-two");
    host.put((1 << 21) + 0x5000 + 4 + 130, b"7");
    assert_eq!(elf("").1["release"], "6.12.1-one");
    // The kernel of before a reset, and that after it.
    host.put((1 << 21) + 0x5000 + 4 + 130, b"6");
    let (note, told) = elf("several Linux kernels");
    assert_eq!((note.len(), told), (0, Value::Null), "{forged}");
    // One that does not fit, alone.
    host.put((1 << 21) + 0x8000, b"x");
    host.put((2 << 21) + 0x5000 + 4 + 130, b"7");
    assert_eq!(elf("does not fit its page tables").0.len(), 0);
}

#[test]
fn a_full_disk_stops_a_dump_that_goes_on_when_there_is_room() {
    let host = large();
    let disk = host.path("disk");
    fs::create_dir(&disk).unwrap();
    // A disk of its own, in a namespace of its own.
    let script = "mount -t tmpfs -o size=64m none \"$0\" || exit 42
        KVMMEM_TOKEN=$2 \"$1\" dump \"$0/dump\"; echo $?
        mount -o remount,size=256m \"$0\"
        KVMMEM_TOKEN=$3 \"$1\" dump \"$0/dump\" --resume; echo $?
        cp \"$0/dump\" \"$0.dump\"";
    let mut command = std::process::Command::new("unshare");
    command.args(["--user", "--map-root-user", "--mount", "sh", "-c", script]).arg(&disk);
    command.arg(env!("CARGO_BIN_EXE_kvmmem")).args([host.grant(&[]).1, host.grant(&[]).1]);
    command.env("KVMMEM_BROKER", host.path("broker.sock")).env("KVMMEM_DEVICE", "/nonexistent");
    let output = command.output().unwrap();
    if output.status.code() == Some(42) || output.stdout.is_empty() {
        eprintln!(
            "skipped: no tmpfs can be mounted in a user namespace, run where `unshare --user --mount` works: {}",
            String::from_utf8_lossy(&output.stderr)
        );
        return;
    }
    let (stdout, stderr) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(stdout.starts_with("1\n") && stdout.ends_with("\n0\n"), "{stdout}{stderr}");
    for words in ["the dump stopped at gpa 0x", "--resume", "No space left"] {
        assert!(stderr.contains(words), "{words}: {stderr}");
    }
    is_whole(&host, &host.path("disk.dump"));
}

#[test]
fn a_lime_file_is_read_as_it_was_written() {
    let host = host();
    host.put((4 << 20) - 2, b"data");
    host.put((16 << 20) + 0x5000, b"more");
    let ended = dump(&host, &[], &["--format", "lime", "--json"]);
    assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
    let record: Value = serde_json::from_str(&ended.stdout).unwrap();
    let bytes = fs::read(path(&host)).unwrap();
    assert_eq!(record["sha256"], hex(&Sha256::digest(&bytes)));
    // Three ranges, each with its header.
    assert_eq!(bytes.len(), (12 << 20) + 3 * 32);
    let file = kvmmem_memory::DumpFile::open(&path(&host)).unwrap();
    let read = |gpa| {
        let mut bytes = [0; 4];
        kvmmem_memory::Memory::read_at(&file, gpa, &mut bytes).unwrap();
        bytes
    };
    assert_eq!((&read((4 << 20) - 2), &read((16 << 20) + 0x5000)), (b"data", b"more"));
    assert_eq!(read(0), [0; 4]);
}

#[test]
fn a_lime_file_that_was_interrupted_goes_on() {
    let host = Host::start(&[
        Region { gpa: 0, len: 96 << 20, offset: 0, file: 0 },
        Region { gpa: 128 << 20, len: 96 << 20, offset: 96 << 20, file: 0 },
    ]);
    let mut ram = File::from(host.ram.fd().try_clone_to_owned().unwrap());
    (1..=(192u64 << 20) / 0x1000).for_each(|number| {
        std::io::Write::write_all(&mut ram, &number.to_le_bytes().repeat(512)).unwrap();
    });
    let path = path(&host);
    let token = host.grant(&[]).1;
    let child = host.view(&token, &["dump", path.to_str().unwrap(), "--format", "lime"]).spawn().unwrap();
    wait_for(&path, |path| fs::metadata(path).is_ok_and(|file| file.len() > 1 << 20));
    signal(&child, Signal::INT);
    let ended = finish(child);
    if ended.code == Some(0) {
        return eprintln!("skipped: the dump was over before it was interrupted; run it on a slower machine");
    }
    let ended = dump(&host, &[], &["--resume", "--format", "lime", "--json"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let record: Value = serde_json::from_str(&ended.stdout).unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!((&record["resumed"], &record["sha256"]), (&json!(true), &json!(hex(&Sha256::digest(&bytes)))));
    assert_eq!(bytes.len(), (192 << 20) + 2 * 32);
    let second = (96 << 20) + 32;
    assert_eq!(&bytes[second..second + 8], b"EMiL\x01\0\0\0");
    for (at, number) in [(32, 1u64), (second - 8, 96 << 8), (second + 32, (96 << 8) + 1)] {
        assert_eq!(bytes[at..at + 8], number.to_le_bytes(), "{at:#x}");
    }
}

#[test]
fn what_is_compressed_unpacks_to_the_same_dump() {
    let host = host();
    for place in [0, (4 << 20) - 2, (16 << 20) + 0x5000] {
        host.put(place, b"data");
    }
    let unpack = |bytes: &[u8]| zstd::decode_all(bytes).unwrap();
    for format in ["raw", "elf", "lime"] {
        assert_eq!(dump(&host, &[], &["--format", format]).code, Some(0));
        let wanted = fs::read(path(&host)).unwrap();
        fs::remove_file(path(&host)).unwrap();
        fs::remove_file(host.path("dump.json")).unwrap();
        let ended = dump(&host, &[], &["--format", format, "--compress", "zstd", "--json"]);
        assert_eq!((ended.code, ended.stderr.as_str()), (Some(0), ""));
        let record: Value = serde_json::from_str(&ended.stdout).unwrap();
        let file = fs::read(path(&host)).unwrap();
        assert!(unpack(&file) == wanted, "{format}");
        assert_eq!(record["compression"], "zstd");
        assert_eq!(record["compressed_bytes"], file.len());
        assert_eq!(
            (&record["bytes"], &record["sha256"]),
            (&json!(wanted.len()), &json!(hex(&Sha256::digest(&wanted))))
        );
        assert!(!part(&host).exists());
        fs::remove_file(path(&host)).unwrap();
        fs::remove_file(host.path("dump.json")).unwrap();
        let output =
            host.view(&host.grant(&[]).1, &["dump", "-", "--format", format, "--compress", "zstd"]).output();
        assert!(unpack(&output.unwrap().stdout) == wanted, "{format}");
    }
}

#[test]
fn what_is_compressed_is_not_resumed() {
    let host = large();
    assert_eq!(dump(&host, &[], &["--compress", "zstd", "--resume"]).code, Some(2));
    let path = path(&host);
    let token = host.grant(&[]).1;
    let child = host.view(&token, &["dump", path.to_str().unwrap(), "--compress", "zstd"]).spawn().unwrap();
    wait_for(&path, |path| fs::metadata(path).is_ok_and(|file| file.len() > 0));
    signal(&child, Signal::INT);
    let ended = finish(child);
    if ended.code == Some(0) {
        return eprintln!("skipped: the dump was over before it was interrupted; run it on a slower machine");
    }
    assert!(ended.stderr.contains("begin again"), "{}", ended.stderr);
    assert!(!path.exists() && !part(&host).exists());
}

#[test]
fn a_target_without_a_monitor_is_neither_paused_nor_are_its_registers_known() {
    let host = host();
    let file = path(&host);
    let file = file.to_str().unwrap();
    // By a token there is no pause.
    assert_eq!(dump(&host, &[], &["--pause"]).code, Some(2));
    let ended = host.run(&["dump", file, "--target", "victim", "--pause"]);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.stderr.contains("cannot pause the target") && ended.stderr.contains("QMP"),
        "{}",
        ended.stderr
    );
    assert!(!path(&host).exists());
    for (arguments, words) in
        [(&["--target", "victim"][..], "no QMP connection"), (&[], "a token opens memory alone")]
    {
        let arguments = [&["dump", file, "--format", "elf", "--json"], arguments].concat();
        let ended =
            if arguments.contains(&"--target") { host.run(&arguments) } else { host.look(&[], &arguments) };
        assert_eq!(ended.code, Some(0), "{}", ended.stderr);
        let record: Value = serde_json::from_str(&ended.stdout).unwrap();
        assert_eq!((&record["registers"]["vcpus"], &record["pause"]), (&json!(0), &Value::Null));
        assert!(record["registers"]["reason"].as_str().unwrap().contains(words), "{record}");
        fs::remove_file(path(&host)).unwrap();
        fs::remove_file(host.path("dump.json")).unwrap();
    }
}

#[test]
fn a_process_is_dumped_of_a_linux_target_alone() {
    let host = host();
    for option in [["--format", "elf"], ["--range", "0..1M"]] {
        assert_eq!(dump(&host, &[], &[&["--pid", "1"], &option[..]].concat()).code, Some(2));
    }
    assert_eq!(dump(&host, &[], &["--pid", "1", "--resume"]).code, Some(2));
    let ended = dump(&host, &[], &["--pid", "1"]);
    assert_eq!(ended.code, Some(1));
    assert!(ended.stderr.contains("no Linux kernel was found"), "{}", ended.stderr);
    assert!(!path(&host).exists() && !host.path("dump.json").exists());
}
