// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `dump`.

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Child;

use kvmmem_broker::link::Change;
use rustix::process::Signal;

use crate::common::{Ended, Host, finish, signal, wait_for};
use crate::{LARGE, host, large};

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
    assert_eq!((word(16, 2), word(18, 2), word(32, 8), word(54, 2), word(56, 2)), (4, 62, 64, 56, 3));
    let mut found = Vec::new();
    for header in (64..).step_by(56).take(3) {
        let [offset, _, paddr, filesz, memsz, align] = [8, 16, 24, 32, 40, 48].map(|at| word(header + at, 8));
        assert_eq!((word(header, 4), filesz, align), (1, memsz, 0x1000));
        assert_eq!(offset % align, paddr % align);
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
    // A process that does not run cannot confirm that its view has ended.
    signal(&child, Signal::STOP);
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
    for words in ["was reset or resized", "begin again"] {
        assert!(ended.stderr.contains(words), "{words}: {}", ended.stderr);
    }
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
