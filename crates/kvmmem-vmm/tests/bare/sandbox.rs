// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A machine whose process has given up what it does not need. It runs in a process of its own:
//! this very program, which is told by its environment to be that.

use std::error::Error;
use std::fs::File;
use std::net::TcpStream;
use std::os::unix::fs::symlink;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use kvmmem_client::admin::Admin;

use kvmmem_abi::hypercall::{MEM_MAP, MEM_UNMAP, SEEK, SEEK_DATA, SEEK_HOLE};
use kvmmem_abi::native::{RIGHT_READ, RIGHT_WRITE, STATE_OPEN, STATE_REVOKED};
use kvmmem_vmm::{Control, ResetPolicy, VmExit, allowed_calls};
use landlock::{AccessFs, CompatLevel, Compatible, Ruleset, RulesetAttr};
use rustix::process::{Pid, Resource, getrlimit, setrlimit, test_kill_process};

use crate::fixture::{
    Target, config_of, has_kvm, launch_with_broker, values, wait_until, window_methods,
};
use crate::guest::{Guest, Method};
use crate::recorder::Recorder;
use crate::views::{Calls, DESCRIPTOR, FIRST, POSITION, REQUEST, THERE, guest};

/// Environment of the process that runs the machine: the folder of its files, and its guest's
/// hypercall method.
const DIRECTORY: &str = "KVMMEM_TEST_SANDBOX_DIRECTORY";
const METHOD: &str = "KVMMEM_TEST_SANDBOX_WAY";

/// What that process does last.
const LAST: &str = "KVMMEM_TEST_SANDBOX_LAST";

/// Not a test, but the process that [`launch`] starts.
#[test]
fn child() {
    let Some(directory) = std::env::var_os(DIRECTORY).map(PathBuf::from) else { return };
    let method =
        if std::env::var_os(METHOD).is_some() { Method::Vmmcall } else { Method::Doorbell };
    let mut config = config_of(directory.join("guest.elf"), method, &directory);
    let broker = directory.join("broker");
    config.broker = broker.exists().then_some(broker);
    config.vcpus = 2;
    config.reset = ResetPolicy::Restart;
    config.sandbox = true;
    let own = std::env::current_exe().unwrap();
    match kvmmem_vmm::run(config, Control::new().handle_signals()) {
        Ok(exit) => assert_eq!(exit, VmExit::PowerOff),
        Err(error) => {
            let chain = std::iter::successors(Some(&error as &(dyn Error + 'static)), |&error| {
                error.source()
            });
            println!("failed {:?}", chain.map(ToString::to_string).collect::<Vec<_>>());
            std::process::exit(1);
        }
    }
    match std::env::var(LAST).as_deref() {
        // Of this process's own files, only those of the machine can be opened.
        Ok("open") => {
            assert!(File::open(directory.join("guest.elf")).is_ok());
            println!("opened {}", File::open(own).is_ok());
        }
        Ok("connect") => drop(TcpStream::connect("127.0.0.1:9")),
        Ok("signal") => drop(test_kill_process(Pid::INIT)),
        Ok("limit") => drop(setrlimit(Resource::Core, getrlimit(Resource::Core))),
        Ok("panic") => panic!("as was asked for"),
        Ok("spawn") => drop(Command::new("/bin/true").spawn()),
        Ok("execute") => drop(Command::new("/bin/true").exec()),
        _ => {}
    }
    std::process::exit(0);
}

fn launch(directory: &Path, method: Method, last: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["sandbox::child", "--exact", "--nocapture", "--test-threads", "1"]);
    command.env(DIRECTORY, directory).env(LAST, last).env("RUST_BACKTRACE", "1");
    if method == Method::Vmmcall {
        command.env(METHOD, "1");
    }
    command.output().unwrap()
}

/// A guest that maps, attaches, searches, loses its grant, and resets itself once.
fn program(method: Method, token: [u64; 4]) -> Guest {
    const OWN: u64 = 0x60_0000;
    let open = u64::from(STATE_OPEN) | u64::from(RIGHT_READ | RIGHT_WRITE) << 32;
    guest(method)
        .write_token(REQUEST, token)
        .attach()
        .call(MEM_MAP, [REQUEST, THERE, OWN])
        .report_memory(OWN)
        // The target's memory is where the guest keeps, over the reset, how far it got.
        .skip_if_zero(FIRST + 0x1000, |guest| {
            guest
                .call(MEM_UNMAP, [OWN, 0, 0])
                .ring(SEEK, [DESCRIPTOR, POSITION, SEEK_HOLE])
                .ring(SEEK, [DESCRIPTOR, POSITION, SEEK_DATA])
                .touch_while(DESCRIPTOR + 24, open, FIRST + THERE, false)
                .report_memory(DESCRIPTOR + 24)
                .power_off()
        })
        .write(FIRST + 0x1000, 1)
        .reset()
}

fn revoke_when_searched(admin: &mut Admin, grant: u64) {
    let deadline = Instant::now() + Duration::from_secs(60);
    let is_searched = |admin: &mut Admin| {
        let grants = admin.grants().unwrap();
        let views = grants.iter().filter(|info| info.id == grant).flat_map(|info| &info.views);
        views.map(|view| view.counters.seeks).sum::<u64>() > 0
    };
    while !is_searched(admin) {
        assert!(Instant::now() < deadline, "the guest searches nothing");
        std::thread::sleep(Duration::from_millis(1));
    }
    admin.revoke(grant).unwrap();
}

#[test]
fn a_machine_runs_in_its_sandbox_and_nothing_else_does() {
    for method in window_methods() {
        for last in ["open", "spawn", "execute"] {
            let target = Target::new();
            target.write(THERE, 0x5ec2e7);
            let make = |token| program(method, token);
            let (output, values) =
                launch_with_broker(&target, 4, make, revoke_when_searched, |config| {
                    launch(config.kernel.parent().unwrap(), method, last)
                });
            let stderr = String::from_utf8_lossy(&output.stderr);
            let stdout = String::from_utf8_lossy(&output.stdout);
            let revoked = u64::from(STATE_REVOKED) | u64::from(RIGHT_READ | RIGHT_WRITE) << 32;
            assert_eq!(values, [0, 0, 0x5ec2e7, 0, 0, 0x5ec2e7, 0, revoked], "{stdout}\n{stderr}");
            if last == "open" {
                assert!(output.status.success(), "{stdout}\n{stderr}");
                assert!(stdout.contains("opened false") || !has_landlock(), "{stdout}\n{stderr}");
            } else {
                assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{stdout}\n{stderr}");
                // The C library blocks all signals, also that of the filter, while it makes a
                // process.
                assert!(
                    last == "spawn" || stderr.contains("made system call"),
                    "{stdout}\n{stderr}"
                );
            }
        }
    }
}

/// The filter itself sees to it that no other calls are made.
#[test]
fn each_regular_call_of_the_sandbox_is_made() {
    /// ioctl(2), which the recorder leaves out.
    const IOCTL: i64 = 16;
    let Some(method) = window_methods().pop() else { return };
    let target = Target::new();
    target.write(THERE, 0x5ec2e7);
    let make = |token| program(method, token);
    let Some(recorder) = Recorder::start() else { return };
    let (output, _) = launch_with_broker(&target, 4, make, revoke_when_searched, |config| {
        launch(config.kernel.parent().unwrap(), method, "nothing")
    });
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let made = recorder.since_filter();
    let unused: Vec<&str> = allowed_calls()
        .filter(|call| call.is_regular && call.number != IOCTL && !made.contains(&call.number))
        .map(|call| call.name)
        .collect();
    assert!(unused.is_empty(), "{unused:?}");
}

#[test]
fn a_call_that_no_machine_needs_ends_the_process() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    Guest::calling(Method::Doorbell).power_off().write_elf(&directory.path().join("guest.elf"));
    // Calls that are not allowed at all, and one that is allowed with other arguments.
    for last in ["connect", "signal", "limit"] {
        let output = launch(directory.path(), Method::Doorbell, last);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{last}: {stderr}");
        assert!(stderr.contains("made system call"), "{last}: {stderr}");
    }
}

#[test]
fn a_panic_in_the_sandbox_is_one_with_its_message() {
    if !has_kvm() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    Guest::calling(Method::Doorbell).power_off().write_elf(&directory.path().join("guest.elf"));
    let output = launch(directory.path(), Method::Doorbell, "panic");
    let printed = [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert_eq!(output.status.code(), Some(101), "{printed:?}");
    assert!(printed.concat().contains("as was asked for"), "{printed:?}");
}

#[test]
fn a_reset_that_is_refused_its_kernel_says_who_refused() {
    if !has_kvm() || !has_landlock() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let [allowed, elsewhere] = ["allowed", "elsewhere"].map(|name| directory.path().join(name));
    for folder in [&allowed, &elsewhere] {
        std::fs::create_dir(folder).unwrap();
        let guest = Guest::calling(Method::Doorbell).write(0x60_0000, 1).report_memory(0x60_0000);
        guest.reset().write_elf(&folder.join("guest.elf"));
    }
    let kernel = directory.path().join("guest.elf");
    symlink(allowed.join("guest.elf"), &kernel).unwrap();
    let output = std::thread::scope(|scope| {
        let running = scope.spawn(|| launch(directory.path(), Method::Doorbell, "nothing"));
        wait_until(|| !values(&directory.path().join("serial")).is_empty());
        let new = directory.path().join("new");
        symlink(elsewhere.join("guest.elf"), &new).unwrap();
        std::fs::rename(&new, &kernel).unwrap();
        running.join().unwrap()
    });
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert_eq!(output.status.code(), Some(1), "{stdout}");
    let folder = allowed.canonicalize().unwrap();
    assert!(stdout.contains("sandbox opens nothing but"), "{stdout}");
    assert!(stdout.contains(&folder.display().to_string()), "{stdout}");
}

fn has_landlock() -> bool {
    let rules = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    rules.handle_access(AccessFs::Execute).and_then(Ruleset::create).is_ok()
}
