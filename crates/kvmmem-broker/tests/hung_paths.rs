// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hooks to paths whose file system never answers. Alone in its program: the children that mount
//! get its file descriptors.

mod common;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

use kvmmem_client::admin::Admin;
use kvmmem_kvmi::request::Request;
use kvmmem_proto::endpoint::Endpoint;
use rustix::io::FdFlags;

use common::{TestBroker, Tool, returns, wait_for};

/// A file system whose server has never read a request.
struct Hung {
    directory: tempfile::TempDir,
    /// Closing it ends all requests.
    device: Option<File>,
}

impl Hung {
    /// `None` where nothing can be mounted here.
    fn mount() -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let device = File::options().read(true).write(true).open("/dev/fuse").ok()?;
        rustix::io::fcntl_setfd(&device, FdFlags::empty()).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&device);
        let options = format!("fd={fd},rootmode=40000,user_id=0,group_id=0");
        let mut mount = Command::new("mount");
        mount.args(["-i", "-t", "fuse", "-o", &options, "hung"]).arg(directory.path());
        let is_mounted = mount.status().is_ok_and(|status| status.success());
        is_mounted.then_some(Self { directory, device: Some(device) })
    }

    fn endpoint(&self, number: usize) -> Endpoint {
        let path: PathBuf = self.directory.path().join(number.to_string());
        Endpoint::Unix(path)
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }
}

impl Drop for Hung {
    fn drop(&mut self) {
        drop(self.device.take());
        let _ = Command::new("umount").arg("-l").arg(self.path()).status();
    }
}

#[test]
fn a_file_system_that_never_answers_holds_up_no_other_hook() {
    let Some(hung) = Hung::mount() else {
        eprintln!("skipped: a FUSE file system cannot be mounted: run the tests as root");
        return;
    };
    let broker = TestBroker::start();
    let names = ["tiger", "lion"];
    let _vms = names.map(|name| broker.target(name));
    let mut admin = broker.admin();
    // One path from both, and others: as many as a target may have but for one.
    let paths = |vm: usize| std::iter::once(0).chain(7 * vm + 1..7 * vm + 7);
    for (vm, name) in names.iter().enumerate() {
        paths(vm).for_each(|path| admin.hook(name, &hung.endpoint(path)).unwrap());
    }
    let tool = Tool::listen(&broker, "tool.sock");
    admin.hook("tiger", &tool.endpoint).unwrap();
    let mut session = returns("the tool's connection", move || tool.accept());
    session.ask(Request::GetVersion).unwrap();
    for (vm, name) in names.iter().enumerate() {
        paths(vm).for_each(|path| admin.unhook(name, &hung.endpoint(path)).unwrap());
    }
    wait_for("the hooks to end", || broker.state.hook_count() == 1);
    session.ask(Request::GetVersion).unwrap();
}

/// All threads that look for paths are stuck. A tool that listens has its path in the kernel's
/// cache.
#[test]
fn many_paths_that_hang_hold_up_no_tool_that_listens() {
    let Some(hung) = Hung::mount() else {
        eprintln!("skipped: a FUSE file system cannot be mounted: run the tests as root");
        return;
    };
    let broker = TestBroker::start();
    let names = ["tiger", "lion", "puma", "lynx"];
    let _vms = names.map(|name| broker.target(name));
    let mut admin = broker.admin();
    let tool = Tool::listen(&broker, "tool.sock");
    let late = Endpoint::Unix(broker.directory.path().join("late.sock"));
    let hang = |admin: &mut Admin, vm: usize, count: usize| {
        (0..count).for_each(|n| admin.hook(names[vm], &hung.endpoint(8 * vm + n)).unwrap());
    };
    (0..3).for_each(|vm| hang(&mut admin, vm, 8));
    // One that waits for a thread when its tool begins to listen, and one whose tool listens
    // already.
    admin.hook("lynx", &late).unwrap();
    admin.hook("lynx", &tool.endpoint).unwrap();
    hang(&mut admin, 3, 6);
    let mut sessions = vec![returns("the tool's connection", move || (tool.accept(), tool)).0];
    let tool = Tool::listen(&broker, "late.sock");
    sessions.push(returns("the late tool's connection", move || (tool.accept(), tool)).0);
    for session in &mut sessions {
        session.ask(Request::GetVersion).unwrap();
    }
}
