// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMMs that lie, hang and end. They are copies of this program, under the name of one.

mod common;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use common::{TestBroker, Tool, ToolSession, request, wait_for};
use kvmmem_abi::errno::KvmError;
use kvmmem_broker::admin::{Admin, AdminError, Evidence, GrantRequest, Rights, Which};
use kvmmem_broker::audit::AuditFile;
use kvmmem_broker::discover::discover;
use kvmmem_broker::host::{HostEvent, HostLink};
use kvmmem_broker::link::RedeemError;
use kvmmem_broker::wire::Refusal;
use kvmmem_kvmi::request::Request;
use rustix::fs::SealFlags;
use rustix::mm::{MapFlags, ProtFlags};
use serde_json::{Value, json};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

/// Says which memory a fake VMM maps: some of `sealed`, `backend` (sealed too), `unsealed`,
/// `private`, each of 32 MiB, with `tables` or a `bootmap` or neither; or `parts` ([`map_parts`]);
/// or that of another process, by its path in `/proc`.
/// It cuts `unsealed` files off as soon as it is told to.
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
    let len = usize::try_from(SIZE).unwrap();
    let (mut mapped, mut files) = (Vec::new(), Vec::new());
    for word in spec.split(' ').filter(|word| word.ends_with("sealed") || *word == "backend") {
        let seals = if word == "unsealed" { SealFlags::GROW } else { SealFlags::SHRINK };
        let file =
            std::fs::File::from(if word == "backend" { backend() } else { common::memfd(SIZE, seals) });
        if spec.contains("tables") {
            write_tables(&file, 0);
        }
        if spec.contains("bootmap") {
            write_boot_map(&file, 0, SIZE, 0);
        }
        files.extend((word == "unsealed").then(|| file.try_clone().unwrap()));
        mapped.push(MmapRegion::<()>::from_file(FileOffset::new(file, 0), len).unwrap());
    }
    let memory = std::fs::OpenOptions::new().write(true).open("/proc/self/mem").unwrap();
    for path in spec.split(' ').filter(|word| word.starts_with("/proc/")) {
        let file = std::fs::File::options().read(true).write(true).open(path).unwrap();
        mapped.push(MmapRegion::<()>::from_file(FileOffset::new(file, 0), len).unwrap());
    }
    for _ in spec.split(' ').filter(|word| *word == "private") {
        let region = private(SIZE);
        if spec.contains("tables") {
            write_tables(&memory, region.as_ptr().addr() as u64);
        }
        mapped.push(region);
    }
    if let Some(parts) = spec.strip_prefix("parts ") {
        mapped.extend(map_parts(parts, &memory));
    }
    println!("\n{READY}");
    if std::io::stdin().read(&mut [0]).is_ok_and(|count| count > 0) {
        for file in files {
            file.set_len(0).unwrap();
        }
        println!("{READY}");
        let _ = std::io::stdin().read(&mut [0]);
    }
}

/// A sealed file of the name that QEMU gives those of its memory backends.
fn backend() -> std::os::fd::OwnedFd {
    let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("memory-backend-memfd", flags).unwrap();
    rustix::fs::ftruncate(&file, SIZE).unwrap();
    rustix::fs::fcntl_add_seals(&file, SealFlags::SHRINK).unwrap();
    file
}

/// Private memory. It has a file, for anonymous memory could become one with what lies beside it.
fn private(size: u64) -> MmapRegion {
    let file = FileOffset::new(common::memfd(size, SealFlags::SHRINK).into(), 0);
    let private = MmapRegionBuilder::<()>::new(usize::try_from(size).unwrap()).with_file_offset(file);
    let (rights, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    let private =
        private.with_mmap_prot(rights.bits().cast_signed()).with_mmap_flags(flags.bits().cast_signed());
    private.build().unwrap()
}

/// RAM in two parts with a boot map in it, and a word in each: `KIND LOW HIGH`, sizes in MiB, as sealed files (`apart`) or as
/// one private mapping, the high part last (`merged`) or first (`reversed`).
fn map_parts(parts: &str, memory: &std::fs::File) -> Vec<MmapRegion> {
    use std::os::unix::fs::FileExt;
    let words: Vec<&str> = parts.split(' ').collect();
    let [low, high] = [words[1], words[2]].map(|word| word.parse::<u64>().unwrap() << 20);
    let fill = |low_file: &std::fs::File, low_at: u64, high_file: &std::fs::File, high_at: u64| {
        write_boot_map(low_file, low_at, low, high);
        low_file.write_all_at(b"low", low_at + low - 3).unwrap();
        high_file.write_all_at(b"high", high_at + 0x5000).unwrap();
    };
    if words[0] == "apart" {
        let files = [low, high].map(|size| std::fs::File::from(common::memfd(size, SealFlags::SHRINK)));
        fill(&files[0], 0, &files[1], 0);
        let map = |(file, size)| {
            MmapRegion::from_file(FileOffset::new(file, 0), usize::try_from(size).unwrap()).unwrap()
        };
        return files.into_iter().zip([low, high]).map(map).collect();
    }
    let region = private(low + high);
    let hva = region.as_ptr().addr() as u64;
    let (low_at, high_at) = if words[0] == "merged" { (0, low) } else { (high, 0) };
    fill(memory, hva + low_at, memory, hva + high_at);
    vec![region]
}

/// ACPI tables as a firmware leaves them, just below the end of the memory, which is at a place in a file.
fn write_tables(file: &std::fs::File, place: u64) {
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
        file.write_all_at(&bytes, place + u64::from(at)).unwrap();
    }
}

/// The memory map that a VMM without a firmware starts a kernel with, by PVH.
fn write_boot_map(file: &std::fs::File, place: u64, low_end: u64, high: u64) {
    use std::os::unix::fs::FileExt;
    let entry = |gpa: u64, len: u64| [gpa, len, 1].map(u64::to_le_bytes).concat();
    let mut entries = vec![entry(0, 0xa_0000), entry(0x10_0000, low_end - 0x10_0000)];
    entries.extend((high > 0).then(|| entry(1 << 32, high)));
    let count = entries.len() as u64;
    let start = [0x0000_0001_336e_c578u64, 0, 0, 0, 0, 0x7000, count].map(u64::to_le_bytes).concat();
    file.write_all_at(&start, place + 0x6000).unwrap();
    file.write_all_at(&entries.concat(), place + 0x7000).unwrap();
}

/// A process that looks like a QEMU, ended on drop.
struct Fake {
    process: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
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
        common::install(&this, &path);
        // What follows `--` is taken for names of further tests, which there are not.
        let mut process = Command::new(path)
            .args(["fake_vmm", "--exact", "--ignored", "--nocapture", "--"])
            .args(arguments)
            .env(SPEC, spec)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let mut fake = Self { process, lines, _directory: directory };
        fake.wait();
        fake
    }

    fn wait(&mut self) {
        let is_ready = self.lines.by_ref().any(|line| line.unwrap() == READY);
        assert!(is_ready, "the fake VMM has ended");
    }

    /// Makes it cut its unsealed files off.
    fn truncate(&mut self) {
        self.process.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        self.wait();
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
    let terms = GrantRequest { target: "fake".into(), ..request(Rights::ReadOnly) };
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
        ("", with(&[]), "no memory of 32M that could be RAM"),
        ("private", with(&[]), "not confirmed by the guest's memory"),
        ("private private tables", with(&[]), "several mappings of 32M"),
        ("sealed sealed tables", with(&[]), "several mappings of 32M"),
        ("sealed", with(&[]), "not confirmed by the guest's memory"),
        ("sealed tables", with(&["-m", "64"]), "no memory of 64M"),
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
fn what_cannot_be_mapped_is_copied() {
    let broker = TestBroker::start();
    let libvirts = [HONEST, &["-object", "x,file=/var/lib/libvirt/k"]].concat();
    let memfd = "-object memory-backend-memfd,id=mem,size=32M,share=on -machine memory-backend=mem";
    let cases = [
        (
            "private tables",
            HONEST,
            "private: no file of 32M is mapped shared; it is copied, not mapped",
            memfd,
        ),
        ("private tables", &libvirts, "private", "<source type='memfd'/>"),
        ("unsealed tables", HONEST, "not sealed against shrinking; it is copied", memfd),
    ];
    for (spec, arguments, reason, remedy) in cases {
        let fake = Fake::start(spec, arguments);
        let added = broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
        let copied = added.copied.unwrap();
        assert!(copied.contains(reason) && copied.contains(remedy), "{copied}");
        // Where it lies in the VMM is nobody's business.
        assert!(added.regions.iter().all(|region| region.offset == region.gpa));
        let again = refusal(&broker, &Which::Pid(fake.pid()));
        assert!(again.contains("registered already"), "{again}");
        let tool = Tool::listen(&broker, "tool.sock");
        broker.admin().hook("fake", &tool.endpoint).unwrap();
        let mut session = tool.accept();
        let read = Request::ReadPhysical { gpa: 0xe_0000, size: 8 };
        assert_eq!(session.ask(read).unwrap(), b"RSD PTR ");
        session.ask(Request::WritePhysical { gpa: 0x10_0000, data: b"stripes" }).unwrap();
        assert_eq!(session.ask(Request::ReadPhysical { gpa: 0x10_0000, size: 7 }).unwrap(), b"stripes");
        let found = discover().unwrap().into_iter().find(|found| found.pid == fake.pid()).unwrap();
        assert!(found.attachable && found.copied && found.remedy.unwrap().contains(remedy));
        drop(fake);
        assert!(session.is_closed());
        wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
        std::fs::remove_file(broker.directory.path().join("tool.sock")).unwrap();
    }
}

#[test]
fn a_file_that_is_cut_off_harms_nobody() {
    let broker = TestBroker::start();
    let mut fake = Fake::start("unsealed tables", HONEST);
    broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
    let tool = Tool::listen(&broker, "tool.sock");
    broker.admin().hook("fake", &tool.endpoint).unwrap();
    let mut session = tool.accept();
    let read = || Request::ReadPhysical { gpa: 0xe_0000, size: 8 };
    session.ask(read()).unwrap();
    fake.truncate();
    assert!(session.ask(read()).is_err());
    assert!(session.ask(Request::WritePhysical { gpa: 0xe_0000, data: b"x" }).is_err());
    assert_eq!(broker.admin().targets().unwrap().len(), 1);
    // What is gone before it is added cannot be added.
    broker.admin().remove_target("fake").unwrap();
    let message = refusal(&broker, &Which::Pid(fake.pid()));
    assert!(message.contains("not confirmed"), "{message}");
}

#[test]
fn other_vmms_are_found_and_refused_by_name() {
    let broker = TestBroker::start();
    for (program, arguments, name) in [
        ("crosvm", &["run", "--mem", "32"][..], "crosvm"),
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
fn vmms_without_a_firmware_are_confirmed_by_the_map_that_they_leave() {
    let broker = TestBroker::start();
    // The answer of both APIs.
    let directory = tempfile::tempdir().unwrap();
    let api = directory.path().join("api.sock");
    let listener = UnixListener::bind(&api).unwrap();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            let _ = stream.read(&mut [0; 1024]);
            let body = json!({ "config": { "memory": { "size": SIZE, "zones": null } }, "mem_size_mib": 32 });
            let body = body.to_string();
            let answer = format!("HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n{body}", body.len());
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    let by_api = format!("path={}", api.display());
    // Cloud Hypervisor does not seal its memory, Firecracker does where it shares it.
    let cases: [(&str, &str, &[&str], bool); 4] = [
        ("cloud-hypervisor", "unsealed bootmap", &["--memory", "size=32M,shared=on"], true),
        ("cloud-hypervisor", "unsealed bootmap", &["--api-socket", &by_api], true),
        ("cloud-hypervisor", "sealed bootmap", &["--memory", "size=32M"], false),
        ("firecracker", "sealed bootmap", &["--api-sock", &api.display().to_string()], false),
    ];
    for (program, spec, arguments, is_copied) in cases {
        let fake = Fake::start_as(program, spec, arguments);
        let which = Which::Pid(fake.pid());
        let added = broker.admin().add_target(&which, Some("micro")).unwrap();
        assert_eq!((added.evidence, added.copied.is_some()), (Evidence::RulesAndBootMap, is_copied));
        assert_eq!(added.regions.iter().map(|region| region.len).sum::<u64>(), SIZE - 0x2_0000);
        drop(fake);
        wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
    }
    for (spec, arguments, words) in [
        ("sealed", &["--memory", "size=32M,shared=on"][..], "that the guest was started with is not found"),
        ("sealed bootmap", &["--memory", "size=64M"], "no memory of 64M"),
        ("sealed bootmap", &["--memory", "size=32M,hotplug_size=1G"], "may have been plugged in"),
        ("sealed bootmap", &["--memory", "size=32M", "--platform", "sev_snp=on"], "AMD SEV-SNP"),
        ("sealed bootmap", &["--api-socket", "/nowhere"], "how much RAM there is"),
    ] {
        let fake = Fake::start_as("cloud-hypervisor", spec, arguments);
        let message = refusal(&broker, &Which::Pid(fake.pid()));
        assert!(message.contains(words), "{spec} {arguments:?}: {message}");
    }
}

#[test]
fn ram_in_two_parts_is_found_wherever_it_lies() {
    let broker = TestBroker::start();
    let cases = [
        // Firecracker up to 1.12 has another hole than later ones.
        ("firecracker", "parts apart 3328 768", 3328u64, 768u64, false),
        ("firecracker", "parts apart 3072 1024", 3072, 1024, false),
        ("cloud-hypervisor", "parts apart 3072 1024", 3072, 1024, false),
        ("firecracker", "parts merged 3328 768", 3328, 768, true),
        ("firecracker", "parts reversed 3328 768", 3328, 768, true),
        ("cloud-hypervisor", "parts merged 3072 1024", 3072, 1024, true),
        ("cloud-hypervisor", "parts reversed 3072 1024", 3072, 1024, true),
    ];
    for (program, spec, low, high, is_copied) in cases {
        let (low, high) = (low << 20, high << 20);
        let option = if program == "firecracker" { "--mem" } else { "--memory" };
        let fake = Fake::start_as(program, spec, &[option, "4G"]);
        let found = discover().unwrap().into_iter().find(|found| found.pid == fake.pid()).unwrap();
        assert!(found.attachable && found.copied == is_copied, "{spec}: {found:?}");
        let added = broker.admin().add_target(&Which::Pid(fake.pid()), Some("parts")).unwrap();
        assert_eq!(
            (added.evidence, added.copied.is_some()),
            (Evidence::RulesAndBootMap, is_copied),
            "{spec}"
        );
        let ends: Vec<u64> = added.regions.iter().map(|region| region.gpa + region.len).collect();
        assert_eq!(ends, [0xa_0000, low, (1 << 32) + high], "{program} {spec}");
        let tool = Tool::listen(&broker, "tool.sock");
        broker.admin().hook("parts", &tool.endpoint).unwrap();
        let mut session = tool.accept();
        let mut read = |gpa, size| session.ask(Request::ReadPhysical { gpa, size }).unwrap();
        assert_eq!(read(low - 3, 3), b"low", "{program} {spec}");
        assert_eq!(read((1 << 32) + 0x5000, 4), b"high", "{program} {spec}");
        drop(fake);
        wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
        std::fs::remove_file(broker.directory.path().join("tool.sock")).unwrap();
    }
    // What the guest was started with is something else.
    let fake = Fake::start_as("cloud-hypervisor", "parts apart 3328 768", &["--memory", "4G"]);
    let message = refusal(&broker, &Which::Pid(fake.pid()));
    assert!(message.contains("no memory of 1G"), "{message}");
}

#[test]
fn a_qemu_under_another_name_is_found() {
    let broker = TestBroker::start();
    for program in [".qemu-system-x86_64-wrapped", "qemu_patched"] {
        let fake = Fake::start_as(program, "sealed tables", HONEST);
        let found = discover().unwrap().into_iter().find(|found| found.pid == fake.pid()).unwrap();
        assert!(found.attachable && found.name.as_deref() == Some("fake"), "{found:?}");
        let added = broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
        assert_eq!((added.target.name.as_str(), added.evidence), ("fake", Evidence::RulesAndAcpi));
        drop(fake);
        wait_for("the target to go", || broker.admin().targets().unwrap().is_empty());
    }
    // Neither its name nor its memory is QEMU's.
    let fake = Fake::start_as("vmm", "sealed tables", HONEST);
    let message = refusal(&broker, &Which::Pid(fake.pid()));
    assert!(message.contains("\"vmm\", which is no VMM that kvmmem knows"), "{message}");
    assert!(discover().unwrap().iter().all(|found| found.pid != fake.pid()));
    drop(fake);
    // Its memory is.
    let fake = Fake::start_as("vmm", "backend tables", HONEST);
    broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
    assert!(discover().unwrap().iter().any(|found| found.pid == fake.pid()));
}

#[test]
fn a_qemu_that_falls_silent_or_raves_keeps_its_target_and_holds_up_no_other() {
    let broker = TestBroker::start();
    let fake = Fake::start("sealed", HONEST);
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("raves.qmp");
    let honest = qmp(directory.path(), &fake, |_, answer| answer);
    let listener = UnixListener::bind(&path).unwrap();
    // Between the broker and a QEMU: what comes back is passed on until it is added, and garbage from then on.
    let (rave, raves) = channel::<&'static str>();
    let (left, is_left) = channel::<()>();
    std::thread::spawn(move || {
        let (mut client, _) = listener.accept().unwrap();
        let mut server = UnixStream::connect(honest).unwrap();
        let (mut from_client, mut to_server) = (client.try_clone().unwrap(), server.try_clone().unwrap());
        std::thread::spawn(move || std::io::copy(&mut from_client, &mut to_server));
        let mut to_client = client.try_clone().unwrap();
        std::thread::spawn(move || std::io::copy(&mut server, &mut to_client));
        for garbage in raves {
            for _ in 0..1000 {
                if client.write_all(garbage.as_bytes()).is_err() {
                    return;
                }
            }
        }
        // Until the broker has had enough.
        while client.write_all(b"garbage \0 {{{\n").is_ok() {}
        drop(left);
    });
    let which = Which::Qmp { socket: path, pid: Some(fake.pid()) };
    broker.admin().add_target(&which, None).unwrap();
    rave.send("{\"event\":\"RESET\",\"data\":{}}\n").unwrap();
    rave.send("{\"event\":\"ACPI_DEVICE_OST\"}\n").unwrap();
    drop(rave);
    let _other = broker.target("other");
    assert_eq!(is_left.recv_timeout(common::PATIENCE), Err(RecvTimeoutError::Disconnected));
    assert_eq!(broker.admin().targets().unwrap().len(), 2);
    let path = broker.path.clone();
    common::returns("the removal", move || Admin::connect(&path).unwrap().remove_target("fake")).unwrap();
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
    common::returns("the broker's end", move || drop(broker.stop()));
}

/// As in a live update: a QEMU that waits for a VM to come has mapped the memory of one whose VMM ends.
#[test]
fn a_vm_continues_with_the_qemu_that_has_its_memory() {
    let broker = TestBroker::start();
    let old = ["first", "second", "third"].map(|name| {
        let fake = Fake::start("sealed tables", HONEST);
        broker.admin().add_target(&Which::Pid(fake.pid()), Some(name)).unwrap();
        fake
    });
    let ram = |fake: &Fake| {
        let files = std::fs::read_dir(format!("/proc/{}/fd", fake.pid())).unwrap();
        let mut paths = files.map(|file| file.unwrap().path());
        let is_ram = |path: &PathBuf| {
            std::fs::read_link(path).is_ok_and(|link| link.to_string_lossy().starts_with("/memfd:ram"))
        };
        paths.find(is_ram).unwrap().display().to_string()
    };
    let incoming = [HONEST, &["-incoming", "defer"]].concat();
    let new = [&old[1], &old[0]].map(|fake| Fake::start(&ram(fake), &incoming));
    // It has the memory of none.
    let _other = Fake::start("sealed", &incoming);
    drop(old);
    let expected = [("first".to_owned(), new[1].pid()), ("second".to_owned(), new[0].pid())];
    let targets = || broker.admin().targets().unwrap().into_iter().map(|vm| (vm.name, vm.pid));
    wait_for("the VMs to have other VMMs", || targets().eq(expected.clone()));
    drop(new);
    wait_for("the VMs to go", || targets().len() == 0);
}

/// Answers like QEMU over QMP, but for what `lie` changes.
fn qmp(directory: &Path, fake: &Fake, lie: impl Fn(&str, Value) -> Value + Send + 'static) -> PathBuf {
    qmp_again(directory, fake, lie, &Arc::default())
}

/// The same to one client after the other; their connections are also the test's.
fn qmp_again(
    directory: &Path,
    fake: &Fake,
    lie: impl Fn(&str, Value) -> Value + Send + 'static,
    clients: &Arc<Mutex<Vec<UnixStream>>>,
) -> PathBuf {
    let process = kvmmem_broker::discover::process::Process::open(fake.pid()).unwrap();
    let mappings = process.mappings().unwrap();
    let hva = mappings.iter().find(|mapping| mapping.len == SIZE).map_or(0, |mapping| mapping.hva);
    let path = directory.join("fake.qmp");
    let listener = UnixListener::bind(&path).unwrap();
    let clients = Arc::clone(clients);
    let serve = move |stream: &UnixStream| {
        let mut writer = stream;
        // At once: the test may send something, too.
        let mut send = |value: Value| writer.write_all(format!("{value}\n").as_bytes());
        clients.lock().unwrap().push(stream.try_clone().unwrap());
        if send(json!({ "QMP": {} })).is_err() {
            return;
        }
        for line in BufReader::new(stream).lines() {
            let Ok(line) = line else { return };
            let request: Value = serde_json::from_str(&line).unwrap();
            let command = request["execute"].as_str().unwrap();
            let answer = match command {
                "query-memdev" => json!([{ "id": "mem", "size": SIZE, "share": true }]),
                "query-memory-size-summary" => json!({ "base-memory": SIZE, "plugged-memory": 0 }),
                "query-memory-devices" => json!([]),
                "query-cpus-fast" => json!([{}, {}]),
                "human-monitor-command" if line.contains("gpa2hva") => {
                    json!(format!("Host virtual address for 0x0 (mem) is {hva:#x}\r\n"))
                }
                "human-monitor-command" => json!(
                    "FlatView #0\n AS \"memory\", root: system\n  0000000000000000-0000000001ffffff (prio 0, ram): mem\n"
                ),
                _ => json!({}),
            };
            if send(json!({ "return": lie(command, answer) })).is_err() {
                return;
            }
        }
    };
    std::thread::spawn(move || listener.incoming().for_each(|stream| serve(&stream.unwrap())));
    path
}

/// A wrapper has made the socket and handed it to QEMU: the process that listens is another one.
#[test]
fn a_handed_socket_is_listened_to_again_where_the_same_qemu_answers() {
    let broker = TestBroker::start();
    let fake = Fake::start("sealed", HONEST);
    let clients = Arc::new(Mutex::new(Vec::new()));
    let count = {
        let clients = Arc::clone(&clients);
        move || clients.lock().unwrap().len()
    };
    let (count_here, listens) = (count.clone(), Arc::new(AtomicBool::new(false)));
    let listens_here = Arc::clone(&listens);
    // The second to answer is another QEMU, to which the wrapper has handed a socket as well.
    let lie = move |command: &str, answer: Value| match answer.as_str() {
        _ if command == "query-status" => {
            listens_here.store(count_here() == 3, Ordering::SeqCst);
            answer
        }
        Some(text) if command == "human-monitor-command" && text.starts_with("Host") && count_here() == 2 => {
            json!("Host virtual address for 0x0 (mem) is 0x7f0000000000\r\n")
        }
        _ => answer,
    };
    let directory = tempfile::tempdir().unwrap();
    let socket = qmp_again(directory.path(), &fake, lie, &clients);
    broker.admin().add_target(&Which::Qmp { socket, pid: Some(fake.pid()) }, None).unwrap();
    let request = GrantRequest { target: "fake".into(), ..request(Rights::ReadOnly) };
    let (mut link, _view) = HostLink::attach(&broker.path, &broker.grant(&request).token, true).unwrap();
    clients.lock().unwrap()[0].shutdown(Shutdown::Both).unwrap();
    wait_for("the same QEMU to be listened to again", || listens.load(Ordering::SeqCst));
    clients.lock().unwrap()[2].write_all(b"{\"event\":\"RESET\",\"data\":{}}\n").unwrap();
    assert!(matches!(link.wait(common::PATIENCE).unwrap(), Some(HostEvent::Changed { .. })));
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
            "of 0x2000000 bytes of RAM from the start 0x4000000 are in memory backends",
        ),
        (
            |command, answer| match command {
                "query-memdev" => json!([{ "id": "mem", "size": SIZE * 2 }]),
                "query-memory-size-summary" => json!({ "base-memory": SIZE * 2 }),
                _ => answer,
            },
            "no memory of 64M at 0x",
        ),
        (
            |command, answer| match command {
                "human-monitor-command" => json!(answer.as_str().unwrap().replace("01ffffff", "ffffffff")),
                _ => answer,
            },
            "no memory of 4294180864 that could be RAM",
        ),
        (
            |command, answer| match (command, answer.as_str()) {
                ("human-monitor-command", Some(text)) if text.starts_with("Host") => {
                    json!("Host virtual address for 0x0 (mem) is 0x1000")
                }
                _ => answer,
            },
            "no memory of 32M at 0x1000, where it says that RAM is",
        ),
        (
            |command, answer| match (command, answer.as_str()) {
                ("human-monitor-command", Some(text)) if text.starts_with("Host") => json!("No memory"),
                _ => answer,
            },
            "is not the answer to",
        ),
        (
            |command, answer| match command {
                "query-memory-devices" => json!([{ "type": "virtio-mem", "data": {} }]),
                _ => answer,
            },
            "of kind \"virtio-mem\"",
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
        let socket = qmp(directory.path(), &fake, lie);
        let message = refusal(&broker, &Which::Qmp { socket, pid: Some(fake.pid()) });
        assert!(message.contains(words), "{message}");
    }
    let directory = tempfile::tempdir().unwrap();
    let socket = qmp(directory.path(), &fake, |_, answer| answer);
    // This process listens, and is no VMM.
    let message = refusal(&broker, &Which::Qmp { socket, pid: None });
    assert!(message.contains("give QEMU's process id too"), "{message}");
    let directory = tempfile::tempdir().unwrap();
    let socket = qmp(directory.path(), &fake, |_, answer| answer);
    let added = broker.admin().add_target(&Which::Qmp { socket, pid: Some(fake.pid()) }, None).unwrap();
    assert_eq!((added.target.vcpus, added.evidence), (2, Evidence::Qmp));
}

#[test]
fn memory_that_is_plugged_in_between_two_questions_is_no_lie() {
    let broker = TestBroker::start();
    let fake = Fake::start("sealed", HONEST);
    let directory = tempfile::tempdir().unwrap();
    let is_asked = AtomicBool::new(false);
    // As if the backend were there only after the first question.
    let socket = qmp(directory.path(), &fake, move |command, answer| {
        let is_first = command == "query-memdev" && !is_asked.swap(true, Ordering::Relaxed);
        if is_first { json!([]) } else { answer }
    });
    let added = broker.admin().add_target(&Which::Qmp { socket, pid: Some(fake.pid()) }, None).unwrap();
    assert_eq!((added.copied, added.evidence), (None, Evidence::Qmp));
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

/// The next broker, on the same folder and with the same memory.
fn next(broker: TestBroker) -> TestBroker {
    let state = broker.directory.path().join("state");
    let next = TestBroker::start_in(broker.stop());
    next.state.remember_in(&state).unwrap();
    next
}

fn names(broker: &TestBroker) -> Vec<String> {
    broker.admin().targets().unwrap().into_iter().map(|target| target.name).collect()
}

fn remembered(broker: &TestBroker) -> Value {
    let text = std::fs::read_to_string(broker.directory.path().join("state/added.json")).unwrap();
    serde_json::from_str::<Value>(&text).unwrap()["vms"].take()
}

#[test]
fn the_next_broker_knows_what_was_added_and_still_runs() {
    let broker = TestBroker::start();
    broker.state.remember_in(&broker.directory.path().join("state")).unwrap();
    let [stays, mut ends, removed] = ["stays", "ends", "removed"].map(|name| {
        let fake = Fake::start("sealed tables", HONEST);
        broker.admin().add_target(&Which::Pid(fake.pid()), Some(name)).unwrap();
        fake
    });
    // One that registers itself is its own business.
    let own = broker.target("own");
    broker.admin().remove_target("removed").unwrap();
    let uuid = broker.admin().targets().unwrap().into_iter().find(|vm| vm.name == "stays").unwrap().uuid;
    assert_eq!(remembered(&broker).as_array().unwrap().len(), 2);
    drop(own);

    // What ends is forgotten, also while nobody looks.
    let broker = next(broker);
    wait_for("two targets", || names(&broker).len() == 2);
    assert_eq!(
        broker.admin().targets().unwrap().into_iter().find(|vm| vm.name == "stays").unwrap().uuid,
        uuid
    );
    let state = broker.directory.path().join("state");
    let directory = broker.stop();
    ends.end();
    let broker = TestBroker::start_in(directory);
    broker.state.remember_in(&state).unwrap();
    wait_for("the one that still runs", || names(&broker) == ["stays"]);
    wait_for("the other to be forgotten", || remembered(&broker).as_array().unwrap().len() == 1);
    drop(stays);
    wait_for("nothing to be left", || names(&broker).is_empty() && remembered(&broker) == json!([]));
    drop(removed);
}

#[test]
fn a_process_id_that_is_somebody_elses_now_is_not_taken_for_it() {
    let broker = TestBroker::start();
    broker.state.remember_in(&broker.directory.path().join("state")).unwrap();
    let fake = Fake::start("sealed tables", HONEST);
    broker.admin().add_target(&Which::Pid(fake.pid()), Some("was")).unwrap();
    let path = broker.directory.path().join("state/added.json");
    let directory = broker.stop();
    let text = std::fs::read_to_string(&path).unwrap();
    let mut content: Value = serde_json::from_str(&text).unwrap();
    let vm = content["vms"][0].take();
    let started = vm["started"].as_u64().unwrap() + 1;
    let inode = vm["role"]["target"]["files"][0]["inode"].as_u64().unwrap() + 1;
    let (mut other, mut files) = (vm.clone(), vm);
    other["started"] = started.into();
    files["role"]["target"]["files"][0]["inode"] = inode.into();
    content["vms"] = json!([other, files]);
    std::fs::write(&path, content.to_string()).unwrap();
    let broker = TestBroker::start_in(directory);
    let log = broker.directory.path().join("audit.log");
    broker.state.audit().write_to(AuditFile::open(&log).unwrap()).unwrap();
    broker.state.remember_in(path.parent().unwrap()).unwrap();
    wait_for("both to be forgotten", || remembered(&broker) == json!([]));
    assert_eq!(names(&broker), [""; 0]);
    // Not even for a moment.
    assert_eq!(std::fs::read_to_string(log).unwrap(), "");
}

/// What a QEMU is called on its command line.
fn called(name: &str) -> Fake {
    let name = format!("guest={name}");
    Fake::start("sealed tables", &["-name", &name, "-m", "32", "-machine", "q35"])
}

#[test]
fn vms_whose_names_are_too_long_are_added_under_different_ones() {
    let broker = TestBroker::start();
    let start = "n".repeat(63);
    let long = [format!("{start}-one"), format!("{start}-two"), "虚拟".repeat(15)];
    let fakes = long.clone().map(|name| called(&name));
    let added = fakes
        .each_ref()
        .map(|fake| broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap().target.name);
    assert!(added.iter().all(|name| name.len() <= 63 && name.contains('~')), "{added:?}");
    assert!(added[0] != added[1] && added[2].starts_with("虚拟虚拟"), "{added:?}");
    // Each is found by that name, and has it again the next time.
    for (name, fake) in added.iter().zip(&fakes) {
        broker.admin().remove_target(name).unwrap();
        let again = broker.admin().add_target(&Which::Pid(fake.pid()), None).unwrap();
        assert_eq!(again.target.name, *name);
    }
}

#[test]
fn a_vm_that_is_called_as_another_s_uuid_needs_another_name() {
    let broker = TestBroker::start();
    let bank = broker.target("bank");
    let uuid = common::target("bank").uuid;
    for name in [uuid.to_string(), uuid.simple().to_string(), uuid.braced().to_string()] {
        let fake = called(&name);
        let message = refusal(&broker, &Which::Pid(fake.pid()));
        assert!(message.contains("UUID") && message.contains("--name"), "{message}");
        broker.admin().add_target(&Which::Pid(fake.pid()), Some("other")).unwrap();
        broker.admin().remove_target("other").unwrap();
    }
    drop(bank);
}

#[test]
fn memory_keeps_its_generation_over_removal_and_the_next_broker() {
    let broker = TestBroker::start();
    broker.state.remember_in(&broker.directory.path().join("state")).unwrap();
    let fake = Fake::start("sealed tables", HONEST);
    let add = |broker: &TestBroker| {
        broker.admin().add_target(&Which::Pid(fake.pid()), Some("tiger")).unwrap();
        generation(broker)
    };
    let first = add(&broker);
    let vm = broker.state.find("tiger").unwrap();
    let regions = vm.ram().unwrap().layout().map.regions().to_vec();
    broker.state.ram_changed(Some(&vm), regions, kvmmem_broker::link::Change::Reset).unwrap();
    assert_eq!(generation(&broker), first + 1);
    broker.admin().remove_target("tiger").unwrap();
    assert_eq!(add(&broker), first + 1);
    let broker = next(broker);
    wait_for("the target", || names(&broker) == ["tiger"]);
    assert_eq!(generation(&broker), first + 1);
    // Another process with the same name is another target.
    broker.admin().remove_target("tiger").unwrap();
    let other = Fake::start("sealed tables", HONEST);
    broker.admin().add_target(&Which::Pid(other.pid()), Some("tiger")).unwrap();
    assert!(![first, first + 1].contains(&generation(&broker)));
}

/// The generation of `tiger`'s RAM, as a view tells it.
fn generation(broker: &TestBroker) -> u64 {
    let granted = broker.grant(&request(Rights::ReadOnly));
    HostLink::attach(&broker.path, &granted.token, true).unwrap().1.generation
}
