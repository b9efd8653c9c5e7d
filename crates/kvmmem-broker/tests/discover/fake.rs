// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A fake VMM: a copy of this program under the name of one.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Child, ChildStdout, Command, Stdio};

use kvmmem_client::ClientError;
use kvmmem_client::admin::Which;
use rustix::fs::SealFlags;
use rustix::mm::{MapFlags, ProtFlags};
use serde_json::{Value, json};
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{FileOffset, MmapRegion};

use crate::common::{self, TestBroker};

/// Says which memory a fake VMM maps: some of `sealed`, `backend` (sealed too), `unsealed`,
/// `private`, each of 32 MiB, with `tables` or a `bootmap` or neither; or `parts` ([`map_parts`]);
/// or that of another process, by its path in `/proc`.
/// It cuts `unsealed` files off as soon as it is told to.
const SPEC: &str = "KVMMEM_FAKE_VMM";

const READY: &str = "the fake VMM is ready";

pub(crate) const SIZE: u64 = 32 << 20;

/// Arguments of a QEMU with that memory.
pub(crate) const HONEST: &[&str] = &["-name", "guest=fake", "-m", "32", "-machine", "q35"];

/// The fake itself: no test, but what the tests start.
#[test]
#[ignore = "a process that the other tests start"]
fn fake_vmm() {
    let Ok(spec) = std::env::var(SPEC) else { return };
    let len = usize::try_from(SIZE).unwrap();
    let (mut mapped, mut files) = (Vec::new(), Vec::new());
    for word in spec.split(' ').filter(|word| word.ends_with("sealed") || *word == "backend") {
        let seals = if word == "unsealed" { SealFlags::GROW } else { SealFlags::SHRINK };
        let file = std::fs::File::from(if word == "backend" {
            backend()
        } else {
            common::memfd(SIZE, seals)
        });
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
    let private =
        MmapRegionBuilder::<()>::new(usize::try_from(size).unwrap()).with_file_offset(file);
    let (rights, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
    let private = private
        .with_mmap_prot(rights.bits().cast_signed())
        .with_mmap_flags(flags.bits().cast_signed());
    private.build().unwrap()
}

/// RAM in two parts with a boot map in it, and a word in each: `KIND LOW HIGH`, sizes in MiB, as
/// sealed files (`apart`) or as one private mapping, the high part last (`merged`) or first
/// (`reversed`).
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
        let files =
            [low, high].map(|size| std::fs::File::from(common::memfd(size, SealFlags::SHRINK)));
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

/// ACPI tables as a firmware leaves them, just below the end of the memory, which is at a place in
/// a file.
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
    for (at, bytes) in [
        (0xe_0000, pointer),
        (base, table(b"DSDT", &[])),
        (base + 0x1000, fixed),
        (base + 0x2000, root),
    ] {
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
    let start =
        [0x0000_0001_336e_c578u64, 0, 0, 0, 0, 0x7000, count].map(u64::to_le_bytes).concat();
    file.write_all_at(&start, place + 0x6000).unwrap();
    file.write_all_at(&entries.concat(), place + 0x7000).unwrap();
}

/// A process that looks like a QEMU, ended on drop.
pub(crate) struct Fake {
    process: Child,
    lines: std::io::Lines<BufReader<ChildStdout>>,
    _directory: tempfile::TempDir,
}

impl Fake {
    pub(crate) fn start(spec: &str, arguments: &[&str]) -> Self {
        Self::start_as("qemu-system-x86_64", spec, arguments)
    }

    pub(crate) fn start_as(program: &str, spec: &str, arguments: &[&str]) -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let path = directory.path().join(program);
        let this = std::env::current_exe().unwrap();
        common::install(&this, &path);
        // What follows `--` is taken for names of further tests, which there are not.
        let mut process = Command::new(path)
            .args(["fake::fake_vmm", "--exact", "--ignored", "--nocapture", "--"])
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

    pub(crate) fn wait(&mut self) {
        let is_ready = self.lines.by_ref().any(|line| line.unwrap() == READY);
        assert!(is_ready, "the fake VMM has ended");
    }

    /// Makes it cut its unsealed files off.
    pub(crate) fn truncate(&mut self) {
        self.process.stdin.as_mut().unwrap().write_all(b"x").unwrap();
        self.wait();
    }

    pub(crate) fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Where its memory is mapped.
    pub(crate) fn hva(&self) -> u64 {
        let process = kvmmem_qemu::process::Process::open(self.pid()).unwrap();
        let mappings = process.mappings().unwrap();
        mappings.iter().find(|mapping| mapping.len == SIZE).map_or(0, |mapping| mapping.hva)
    }

    pub(crate) fn end(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Fake {
    fn drop(&mut self) {
        self.end();
    }
}

/// What an honest QEMU with the memory of a [`Fake`], mapped at `hva`, answers over QMP.
pub(crate) fn qmp_answer(line: &str, command: &str, hva: u64) -> Value {
    match command {
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
    }
}

pub(crate) fn refusal(broker: &TestBroker, which: &Which) -> String {
    match broker.admin().add_target(which, None) {
        Err(ClientError::Refused { message, .. }) => message,
        other => panic!("{other:?}"),
    }
}
