// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A dump that was not finished.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use kvmmem_client::vmm::{Change, Region};
use rustix::process::Signal;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::{BEGUN, TRIES, begin, dump, hex, interrupted, is_whole, part, path, remove};
use crate::common::blocked::stop;
use crate::common::{Host, finish, signal, wait_for};
use crate::{LARGE, host, large};

/// A dump whose process is stopped in its midst, and its grant.
fn stopped(host: &Host) -> (String, Child) {
    for _ in 0..TRIES {
        let (grant, token) = host.grant(&[]);
        let child = begin(host, &token, &[], BEGUN);
        if stop(&child) && fs::metadata(path(host)).unwrap().len() < LARGE[0].len {
            return (grant, child);
        }
        signal(&child, Signal::CONT);
        assert_eq!(finish(child).code, Some(0));
        remove(host);
    }
    panic!("no dump can be stopped: they are too quick")
}

#[test]
fn a_dump_is_stopped_by_revocation_and_goes_on_by_a_new_grant() {
    let host = large();
    // A process that does not run cannot confirm that its view has ended.
    let (grant, child) = stopped(&host);
    let revoked = host.run(&["grant", "revoke", &grant]);
    assert_eq!(revoked.code, Some(3), "{}", revoked.stderr);
    assert!(revoked.stdout.contains("not confirmed by 1 of its users"), "{}", revoked.stdout);
    signal(&child, Signal::CONT);
    let ended = finish(child);
    assert_eq!(ended.code, Some(1));
    for words in ["the dump stopped at gpa 0x", "--resume", "revoked"] {
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
    let ended = interrupted(&host, &[], BEGUN);
    assert_eq!(ended.code, Some(1));
    assert!(
        ended.stderr.contains("interrupted") && ended.stderr.contains("--resume"),
        "{}",
        ended.stderr
    );

    let whole = fs::read_to_string(part(&host)).unwrap();
    fs::write(part(&host), whole.replace("00112233", "99112233")).unwrap();
    let ended = dump(&host, &[], &["--resume"]);
    assert!(
        ended.code == Some(1) && ended.stderr.contains("another target, 99112233"),
        "{}",
        ended.stderr
    );
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
    assert_eq!(interrupted(&host, &[], BEGUN).code, Some(1));
    host.next_broker();
    let state = fs::read(part(&host)).unwrap();
    let half = host.path("half");
    fs::copy(path(&host), &half).unwrap();
    // The link reports the run just after it has registered.
    let deadline = Instant::now() + Duration::from_secs(30);
    loop {
        let ended = dump(&host, &[], &["--resume"]);
        if ended.code == Some(0) {
            break;
        }
        assert!(
            Instant::now() < deadline && ended.stderr.contains("started again"),
            "{}",
            ended.stderr
        );
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
fn a_complete_dump_whose_checkpoint_is_left_is_finished_without_a_token() {
    let host = large();
    assert_eq!(interrupted(&host, &[], BEGUN).code, Some(1));
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
    assert!(
        refused.code == Some(1) && refused.stderr.contains("elsewhere exists"),
        "{}",
        refused.stderr
    );
    let finished = again(&[]);
    assert_eq!((finished.code, finished.stderr.as_str()), (Some(0), ""));
    let [said, before] =
        [&finished, &ended].map(|it| serde_json::from_str::<Value>(&it.stdout).unwrap());
    assert_eq!(said, before);
    assert!(!part(&host).exists());
    is_whole(&host, &path(&host));
    // The record of another dump does not make this one complete.
    let begun = String::from_utf8(checkpoint).unwrap();
    let other = begun.replace("\"started_ms\":1", "\"started_ms\":2");
    assert_ne!(begun, other);
    fs::write(part(&host), other).unwrap();
    let refused = again(&[]);
    assert!(
        refused.code == Some(1) && refused.stderr.contains("dump.json exists"),
        "{}",
        refused.stderr
    );
}

#[test]
fn an_interrupt_before_there_is_a_view_leaves_no_file() {
    let host = host();
    let (path, listen) = (path(&host), host.endpoint());
    let child =
        host.command(&["dump", path.to_str().unwrap(), "--listen", &listen]).spawn().unwrap();
    wait_for(&host.path("tool.sock"), Path::exists);
    signal(&child, Signal::INT);
    assert_ne!(finish(child).code, Some(0));
    assert!(!path.exists() && !part(&host).exists());
}

#[test]
fn the_digest_of_a_dump_that_went_on_is_of_the_whole_file() {
    let host = large();
    assert_eq!(interrupted(&host, &[], BEGUN).code, Some(1));
    assert!(!host.path("dump.json").exists());
    let ended = dump(&host, &[], &["--resume", "--json"]);
    let record: Value = serde_json::from_str(&ended.stdout).unwrap();
    let digest: String = hex(&Sha256::digest(fs::read(path(&host)).unwrap()));
    assert_eq!((&record["sha256"], &record["resumed"]), (&digest.as_str().into(), &true.into()));
}

#[test]
fn a_dump_goes_on_beyond_what_cannot_be_read() {
    let file = tempfile::tempfile().unwrap();
    file.set_len(LARGE[0].len).unwrap();
    let page = vec![0x5a; 1 << 20];
    (0..LARGE[0].len).step_by(1 << 20).for_each(|at| file.write_all_at(&page, at).unwrap());
    let host = Host::start_file(&LARGE, &file);
    assert_eq!(interrupted(&host, &[], BEGUN).code, Some(1));
    let whole = LARGE[0].len - 0x20_0000;
    file.set_len(whole).unwrap();
    let ended = dump(&host, &[], &["--resume", "--json"]);
    assert_eq!(ended.code, Some(3), "{}", ended.stderr);
    let record: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!(record["unreadable"], json!([{"gpa": format!("{whole:#x}"), "len": 0x20_0000}]));
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
    let (stdout, stderr) =
        (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(stdout.starts_with("1\n") && stdout.ends_with("\n0\n"), "{stdout}{stderr}");
    for words in ["the dump stopped at gpa 0x", "--resume", "No space left"] {
        assert!(stderr.contains(words), "{words}: {stderr}");
    }
    is_whole(&host, &host.path("disk.dump"));
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
    assert_eq!(interrupted(&host, &["--format", "lime"], BEGUN).code, Some(1));
    let ended = dump(&host, &[], &["--resume", "--format", "lime", "--json"]);
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
    let record: Value = serde_json::from_str(&ended.stdout).unwrap();
    let bytes = fs::read(&path).unwrap();
    assert_eq!(
        (&record["resumed"], &record["sha256"]),
        (&json!(true), &json!(hex(&Sha256::digest(&bytes))))
    );
    assert_eq!(bytes.len(), (192 << 20) + 2 * 32);
    let second = (96 << 20) + 32;
    assert_eq!(&bytes[second..second + 8], b"EMiL\x01\0\0\0");
    for (at, number) in [(32, 1u64), (second - 8, 96 << 8), (second + 32, (96 << 8) + 1)] {
        assert_eq!(bytes[at..at + 8], number.to_le_bytes(), "{at:#x}");
    }
}

#[test]
fn what_is_compressed_is_not_resumed() {
    let host = large();
    assert_eq!(dump(&host, &[], &["--compress", "zstd", "--resume"]).code, Some(2));
    let path = path(&host);
    let ended = interrupted(&host, &["--compress", "zstd"], 0);
    assert!(ended.stderr.contains("begin again"), "{}", ended.stderr);
    assert!(!path.exists() && !part(&host).exists());
}
