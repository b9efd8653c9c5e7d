// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Cores that cannot even be begun.

use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::common::finish;
use crate::guest::{PID, guest, memory};

#[test]
fn a_core_that_cannot_be_begun_leaves_no_file() {
    if !rustix::process::geteuid().is_root() {
        return eprintln!(
            "skipped: only root can become a user without threads: run the tests as root"
        );
    }
    let folder = tempfile::tempdir().unwrap();
    let user = 0x4000_0000 + std::process::id();
    std::os::unix::fs::chown(folder.path(), Some(user), None).unwrap();
    let (ram, core) = (folder.path().join("ram"), folder.path().join("core"));
    std::fs::write(&ram, memory(&guest(1 << 20), 1 << 20)).unwrap();
    // SHA-256 takes a thread of its own, and this user may have none.
    let dump = |limit: &str| {
        let mut command = Command::new("prlimit");
        command.arg(limit).arg(env!("CARGO_BIN_EXE_kvmmem")).arg("dump").arg(&core);
        command.args(["--pid", PID, "--file"]).arg(&ram).uid(user).env_remove("RUST_LOG");
        finish(command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    };
    let refused = dump("--nproc=1");
    if refused.stderr.contains("prlimit: ") {
        return eprintln!(
            "skipped: another user cannot run this program, make its folder readable: {}",
            refused.stderr
        );
    }
    assert_eq!(refused.code, Some(1), "{}", refused.stderr);
    assert!(refused.stderr.contains("cannot start a thread"), "{}", refused.stderr);
    assert!(!core.exists());
    let ended = dump("--nproc=64");
    assert_eq!(ended.code, Some(0), "{}", ended.stderr);
}
