// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMMs that lie, hang and end. They are copies of this program, under the name of one.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use common::{TestBroker, Tool, ToolSession, request, wait_for};
use kvmmem_abi::errno::KvmError;
use kvmmem_broker::admin::{AdminError, Evidence, Rights, Which};
use kvmmem_broker::discover::discover;
use kvmmem_broker::host::HostLink;
use kvmmem_broker::link::RedeemError;
use kvmmem_broker::wire::Refusal;
use kvmmem_kvmi::request::Request;
use rustix::fs::SealFlags;
use serde_json::{Value, json};
use vm_memory::{FileOffset, MmapRegion};

/// Says which memory a fake VMM maps: some of `sealed`, `unsealed`, `tables`, each memfd 32 MiB.
const SPEC: &str = "KVMMEM_FAKE_VMM";

const READY: &str = "the fake VMM is ready";

const SIZE: u64 = 32 << 20;

/// Arguments of a QEMU with that memory.
const HONEST: &[&str] = &["-name", "guest=fake", "-m", "32", "-machine", "q35"];

/// The fake itself: no test, but what the tests start.
#[test]
#[ignore = "a process that the other tests start"]
fn fake_vmm() {
    let Ok(spec) = std::env::var(SPEC) else { return };
    let mut mapped = Vec::new();
    for word in spec.split(' ').filter(|word| word.ends_with("sealed")) {
        let seals = if word == "sealed" { SealFlags::SHRINK } else { SealFlags::GROW };
        let file = std::fs::File::from(common::memfd(SIZE, seals));
        if spec.contains("tables") {
            write_tables(&file);
        }
        let len = usize::try_from(SIZE).unwrap();
        mapped.push(MmapRegion::<()>::from_file(FileOffset::new(file, 0), len).unwrap());
    }
    println!("\n{READY}");
    let _ = std::io::stdin().read(&mut [0]);
}

/// ACPI tables as a firmware leaves them, just below the end of the memory.
fn write_tables(file: &std::fs::File) {
    use std::os::unix::fs::FileExt;
    let sealed = |mut bytes: Vec<u8>, at: usize| {
        bytes[at] = bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_sub(*byte));
        bytes
    };
    let table = |signature: &[u8; 4], body: &[u8]| {
        let mut bytes = signature.to_vec();
        bytes.extend(u32::try_from(36 + body.len()).unwrap().to_le_bytes());
        bytes.resize(36, 0);
        bytes.extend(body);
        sealed(bytes, 9)
    };
    let base = u32::try_from(SIZE).unwrap() - 0x4000;
    let fixed = table(b"FACP", &[0, base].map(u32::to_le_bytes).concat());
    let root = table(b"RSDT", &(base + 0x1000).to_le_bytes());
    let pointer = sealed([b"RSD PTR \0FAKEVM\0", &(base + 0x2000).to_le_bytes()[..]].concat(), 8);
    for (at, bytes) in
        [(0xe_0000, pointer), (base, table(b"DSDT", &[])), (base + 0x1000, fixed), (base + 0x2000, root)]
    {
        file.write_all_at(&bytes, u64::from(at)).unwrap();
    }
}

/// A process that looks like a QEMU, ended on drop.
struct Fake {
    process: Child,
    _directory: tempfile::TempDir,
}

impl Fake {
    fn start(spec: &str, arguments: &[&str]) -> Self {
        Self::start_as("qemu-system-x86_64", spec, arguments)
    }

    fn start_as(program: &str, spec: &str, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = directory.path().join(program);
        let this = std::env::current_exe().unwrap();
        std::fs::hard_link(&this, &path).or_else(|_| std::fs::copy(&this, &path).map(|_| ())).unwrap();
        // What follows `--` is taken for names of further tests, which there are not.
        let mut process = Command::new(path)
            .args(["fake_vmm", "--exact", "--ignored", "--nocapture", "--"])
            .args(arguments)
            .env(SPEC, spec)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdout = process.stdout.take().unwrap();
        let ready = BufReader::new(stdout).lines().any(|line| line.unwrap() == READY);
        assert!(ready, "the fake VMM did not start");
        Self { process, _directory: directory }
    }

    fn pid(&self) -> u32 {
        self.process.id()
    }

    fn end(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.end();
    }
}

fn refusal(broker: &TestBroker, which: &Which) -> String {
    match broker.admin().add_target(which, None) {
        Err(AdminError::Refused { message, .. }) => message,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_vmm_that_lies_shows_no_more_than_its_own_file() {
    let broker = TestBroker::start();
    let mut fake = Fake::start("sealed tables", HONEST);
    let added = broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
    assert_eq!((added.target.name.as_str(), added.evidence), ("fake", Evidence::RulesAndAcpi));
    assert_eq!(added.regions.iter().map(|region| region.len).sum::<u64>(), SIZE - 0x2_0000);
    let terms = kvmmem_broker::admin::GrantRequest { target: "fake".into(), ..request(Rights::ReadOnly) };
    let (link, view) = HostLink::attach(&broker.path, &broker.grant(&terms).token, true).unwrap();
    let mut bytes = [0; 8];
    rustix::io::pread(&view.files[0], &mut bytes, 0xe_0000).unwrap();
    assert_eq!(&bytes, b"RSD PTR ");
    fake.end();
    wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
    drop(link);
}

#[test]
fn tools_use_an_added_target_as_any_other() {
    let broker = TestBroker::start();
    let mut fake = Fake::start("sealed tables", HONEST);
    broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
    let tool = Tool::listen(&broker, "tool.sock");
    broker.admin().hook("fake", &tool.endpoint).unwrap();
    let mut session = tool.accept();
    let read = |session: &mut ToolSession, gpa, size| session.ask(Request::ReadPhysical { gpa, size });
    assert_eq!(read(&mut session, 0xe_0000, 8).unwrap(), b"RSD PTR ");
    assert_eq!(read(&mut session, 0xa_0000, 8), Err(KvmError::Inval));
    session.ask(Request::WritePhysical { gpa: 0x10_0000, data: b"stripes" }).unwrap();
    assert_eq!(read(&mut session, 0x10_0000, 7).unwrap(), b"stripes");
    let (introspector, _views) = broker.viewer("watcher", 4, Duration::ZERO);
    let token = session.token().unwrap();
    assert_eq!(introspector.redeem(&token).unwrap().target.name(), "fake");
    let unused = session.token().unwrap();
    fake.end();
    assert!(session.is_closed());
    wait_for("the target to go", || broker.admin().targets().unwrap().len() == 1);
    assert!(matches!(introspector.redeem(&unused), Err(RedeemError::Unknown)));
}

#[test]
fn what_is_wrong_with_the_memory_is_said() {
    let broker = TestBroker::start();
    let with = |more: &[&'static str]| [HONEST, more].concat();
    let cases: Vec<(&str, Vec<&str>, &str)> = vec![
        (
            "",
            with(&[]),
            "its RAM is private: no file of 32M is mapped shared; start it with: -object memory-backend-memfd,id=mem,size=32M,share=on",
        ),
        ("", with(&["-object", "x,file=/var/lib/libvirt/k"]), "<source type='memfd'/>"),
        ("unsealed tables", with(&[]), "is not sealed against shrinking"),
        ("sealed sealed", with(&[]), "2 files of 32M are mapped shared"),
        ("sealed", with(&[]), "not confirmed by the guest's memory"),
        ("sealed tables", with(&["-m", "64"]), "private: no file of 64M"),
        ("sealed tables", with(&["-m", "32,maxmem=1G"]), "may have been plugged in"),
        ("sealed tables", with(&["-machine", "microvm"]), "machine type \"microvm\""),
        ("sealed tables", with(&["-object", "sev-snp-guest,id=s"]), "confidential (AMD SEV-SNP)"),
        ("sealed tables", with(&["-object", "{\"qom-type\":\"tdx-guest\"}"]), "confidential (Intel TDX)"),
    ];
    for (spec, arguments, words) in cases {
        let fake = Fake::start(spec, &arguments);
        let message = refusal(&broker, &Which::Pid(fake.pid()));
        assert!(message.contains(words), "{spec} {arguments:?}: {message}");
    }
    assert!(broker.admin().targets().unwrap().is_empty());
}

#[test]
fn other_vmms_are_found_and_refused_by_name() {
    let broker = TestBroker::start();
    for (program, arguments, name) in [
        ("cloud-hypervisor", &["--memory", "size=32M,shared=on", "--cpus", "boot=2"][..], "Cloud Hypervisor"),
        ("firecracker", &["--id", "vm", "--api-sock", "/x"][..], "Firecracker"),
        ("kvmmem", &["vm", "--name", "vm"][..], "registers its VM by itself"),
    ] {
        let fake = Fake::start_as(program, "sealed", arguments);
        let message = refusal(&broker, &Which::Pid(fake.pid()));
        assert!(message.contains(name), "{message}");
        let found = discover().unwrap().into_iter().find(|found| found.pid == fake.pid()).unwrap();
        assert!(!found.attachable && found.reason.unwrap().contains(name));
    }
}

#[test]
fn who_is_no_vmm_is_refused() {
    let broker = TestBroker::start();
    let message = refusal(&broker, &Which::Pid(std::process::id()));
    assert!(message.contains("is no VMM"), "{message}");
    let mut fake = Fake::start("sealed tables", HONEST);
    fake.end();
    let message = refusal(&broker, &Which::Pid(fake.pid()));
    assert!(message.contains(&format!("no process {}", fake.pid())), "{message}");
    let message = refusal(&broker, &Which::Libvirt("../../x".into()));
    assert!(message.contains("libvirt runs no VM"), "{message}");
}

#[test]
fn only_what_was_added_is_removed() {
    let broker = TestBroker::start();
    let _own = broker.target("own");
    for (target, refusal) in [("own", Refusal::Denied), ("nobody", Refusal::Unknown)] {
        let refused = broker.admin().remove_target(target).unwrap_err();
        assert!(matches!(refused, AdminError::Refused { refusal: r, .. } if r == refusal), "{refused}");
    }
    let fake = Fake::start("sealed tables", HONEST);
    broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
    broker.admin().remove_target("fake").unwrap();
    assert_eq!(broker.admin().targets().unwrap().len(), 1);
    broker.admin().add_target(&Which::Pid(fake.pid()), Some("again")).unwrap();
    // The broker ends at once, although a VM is left that has no connection.
    let began = Instant::now();
    broker.stop();
    assert!(began.elapsed() < Duration::from_secs(4));
}

/// Answers like QEMU over QMP, but for what `lie` changes.
fn qmp(directory: &Path, lie: impl Fn(&str, Value) -> Value + Send + 'static) -> PathBuf {
    let path = directory.join("fake.qmp");
    let listener = UnixListener::bind(&path).unwrap();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let requests = BufReader::new(stream.try_clone().unwrap());
        writeln!(stream, "{}", json!({ "QMP": {} })).unwrap();
        for line in requests.lines() {
            let Ok(line) = line else { return };
            let request: Value = serde_json::from_str(&line).unwrap();
            let command = request["execute"].as_str().unwrap();
            let answer = match command {
                "query-memdev" => json!([{ "id": "mem", "size": SIZE, "share": true }]),
                "query-memory-size-summary" => json!({ "base-memory": SIZE, "plugged-memory": 0 }),
                "query-cpus-fast" => json!([{}, {}]),
                "human-monitor-command" => json!(
                    "FlatView #0\n AS \"memory\", root: system\n  0000000000000000-0000000001ffffff (prio 0, ram): mem\n"
                ),
                _ => json!({}),
            };
            if writeln!(stream, "{}", json!({ "return": lie(command, answer) })).is_err() {
                return;
            }
        }
    });
    path
}

#[test]
fn lies_over_qmp_are_measured_by_the_kernel() {
    let broker = TestBroker::start();
    let fake = Fake::start("sealed", HONEST);
    type Lie = fn(&str, Value) -> Value;
    let cases: Vec<(Lie, &str)> = vec![
        (
            |command, answer| {
                if command == "query-memdev" { json!([{ "id": "mem", "size": SIZE * 2 }]) } else { answer }
            },
            "only one backend",
        ),
        (
            |command, answer| match command {
                "query-memdev" => json!([{ "id": "mem", "size": SIZE * 2 }]),
                "query-memory-size-summary" => json!({ "base-memory": SIZE * 2 }),
                _ => answer,
            },
            "private: no file of 64M",
        ),
        (
            |command, answer| match command {
                "human-monitor-command" => json!(answer.as_str().unwrap().replace("01ffffff", "ffffffff")),
                _ => answer,
            },
            "regions need 0x100000000",
        ),
        (
            |command, answer| match command {
                "human-monitor-command" => {
                    json!(answer.as_str().unwrap().replace("mem\n", "mem\n  x\n  0 (prio\n"))
                }
                _ => answer,
            },
            "which is no range",
        ),
        (|_, _| json!([]), "is not the answer to"),
    ];
    for (lie, words) in cases {
        let directory = tempfile::tempdir().unwrap();
        let socket = qmp(directory.path(), lie);
        let message = refusal(&broker, &Which::Qmp { socket, pid: Some(fake.pid()) });
        assert!(message.contains(words), "{message}");
    }
    let directory = tempfile::tempdir().unwrap();
    let socket = qmp(directory.path(), |_, answer| answer);
    // This process listens, and is no VMM.
    let message = refusal(&broker, &Which::Qmp { socket, pid: None });
    assert!(message.contains("give QEMU's process id too"), "{message}");
    let directory = tempfile::tempdir().unwrap();
    let socket = qmp(directory.path(), |_, answer| answer);
    let added = broker.admin().add_target(&Which::Qmp { socket, pid: Some(fake.pid()) }, None).unwrap();
    assert_eq!((added.target.vcpus, added.evidence), (2, Evidence::Qmp));
}

#[test]
fn a_qmp_socket_that_hangs_holds_up_nobody_else() {
    let broker = TestBroker::start();
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("hangs.qmp");
    let listener = UnixListener::bind(&socket).unwrap();
    let began = Instant::now();
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| refusal(&broker, &Which::Qmp { socket: socket.clone(), pid: None }));
        let (_silent, _) = listener.accept().unwrap();
        let _own = broker.target("own");
        assert_eq!(broker.admin().targets().unwrap().len(), 1);
        assert!(!waiting.is_finished());
        let message = waiting.join().unwrap();
        assert!(message.contains("nothing answers"), "{message}");
    });
    assert!(began.elapsed() < Duration::from_secs(30));
}
