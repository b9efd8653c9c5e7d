// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What `/proc` says of this process and of one that has ended.

use super::*;
use crate::file_id::FileId;

#[test]
fn this_process_is_seen() {
    let process = Process::open(std::process::id()).unwrap();
    assert!(process.is_alive());
    assert_eq!(process.uid().unwrap(), rustix::process::geteuid().as_raw());
    let program = std::env::current_exe().unwrap();
    assert_eq!(process.program().unwrap(), program.file_name().unwrap().to_string_lossy());
    let arguments: Vec<String> = std::env::args().collect();
    assert_eq!(process.arguments().unwrap(), arguments);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let age = i64::try_from(now.as_millis()).unwrap() - process.start_time_ms().unwrap();
    assert!((-2000..86_400_000).contains(&age), "{age}");
    assert!(!process.mappings().unwrap().is_empty());
}

#[test]
fn an_identity_is_one_process_s() {
    let of = |pid| Process::open(pid).unwrap().identity().unwrap();
    let this = of(std::process::id());
    assert_eq!(this, of(std::process::id()));
    assert_ne!(this, of(1));
}

#[test]
fn an_open_file_is_found_by_its_identity_alone() {
    let file = tempfile::tempfile().unwrap();
    let id = FileId::of(&rustix::fs::fstat(&file).unwrap());
    let process = Process::open(std::process::id()).unwrap();
    let opened = process.open_file(id).unwrap().unwrap();
    assert_eq!(FileId::of(&rustix::fs::fstat(&opened).unwrap()), id);
    assert!(process.open_file(FileId { device: id.device, inode: u64::MAX }).unwrap().is_none());
}

#[test]
fn who_is_not_there_is_gone() {
    for pid in [0, u32::MAX, i32::MAX as u32] {
        assert!(matches!(Process::open(pid), Err(ProcessError::Gone(_))));
    }
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let process = Process::open(child.id()).unwrap();
    child.wait().unwrap();
    assert!(!process.is_alive());
    assert!(matches!(process.arguments(), Err(ProcessError::Gone(_))));
}
