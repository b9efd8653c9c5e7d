// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `dump`.

mod file;
mod format;
mod resume;
mod stream;

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Child;

use rustix::process::Signal;

use crate::LARGE;
use crate::common::{Ended, Host, finish, signal, wait_for};

/// How often a dump is begun that is to be stopped in its midst.
const TRIES: usize = 20;

/// How much of a dump is written when it has begun.
const BEGUN: u64 = 1 << 20;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn path(host: &Host) -> PathBuf {
    host.path("dump")
}

fn dump(host: &Host, grant: &[&str], arguments: &[&str]) -> Ended {
    host.look(grant, &[&["dump", path(host).to_str().unwrap()], arguments].concat())
}

/// A dump that has begun, of which more than `least` bytes are written.
fn begin(host: &Host, token: &str, arguments: &[&str], least: u64) -> Child {
    let path = path(host);
    let arguments = [&["dump", path.to_str().unwrap()], arguments].concat();
    let child = host.view(token, &arguments).spawn().unwrap();
    wait_for(&path, |path| fs::metadata(path).is_ok_and(|file| file.len() > least));
    child
}

/// How a dump ended that was interrupted in its midst. A test that gets little of the processors
/// may be too late for one, and begins another.
fn interrupted(host: &Host, arguments: &[&str], least: u64) -> Ended {
    for _ in 0..TRIES {
        let child = begin(host, &host.grant(&[]).1, arguments, least);
        signal(&child, Signal::INT);
        let ended = finish(child);
        if ended.code != Some(0) {
            return ended;
        }
        remove(host);
    }
    panic!("no dump can be interrupted: they are too quick")
}

/// Removes a complete dump.
fn remove(host: &Host) {
    fs::remove_file(path(host)).unwrap();
    fs::remove_file(host.path("dump.json")).unwrap();
}

fn part(host: &Host) -> PathBuf {
    host.path("dump.part")
}

#[track_caller]
fn is_whole(host: &Host, file: &Path) {
    let (mut wanted, mut found) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let (ram, file) =
        (File::from(host.ram.fd().try_clone_to_owned().unwrap()), File::open(file).unwrap());
    for offset in (0..LARGE[0].len).step_by(1 << 20) {
        ram.read_exact_at(&mut wanted, offset).unwrap();
        file.read_exact_at(&mut found, offset).unwrap();
        assert!(wanted == found, "the dump is wrong at {offset:#x}");
    }
}
