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

use crate::LARGE;
use crate::common::{Ended, Host, wait_for};

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
    let (ram, file) =
        (File::from(host.ram.fd().try_clone_to_owned().unwrap()), File::open(file).unwrap());
    for offset in (0..LARGE[0].len).step_by(1 << 20) {
        ram.read_exact_at(&mut wanted, offset).unwrap();
        file.read_exact_at(&mut found, offset).unwrap();
        assert!(wanted == found, "the dump is wrong at {offset:#x}");
    }
}
