// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A search through 1 GiB of a target on the host, through a view's mapping, against the same search by a reader that
//! copies with process_vm_readv from the VMM's memory, as other tools do.
//!
//! The mapping is made anew for each search, as by a tool that is started for it, or kept, as by one that searches again
//! and again. A third search goes through RAM that the VMM keeps to itself, of which the broker makes copies. Prints a
//! line for each; with `--json` an object.
#![deny(unsafe_code)]

use std::error::Error;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvmmem::{Access, Mapping, Range, View};
use kvmmem_broker::admin::{Admin, GrantRequest};
use kvmmem_broker::broker::Broker;
use kvmmem_broker::link::{Region, Registration, VmmLink};
use kvmmem_broker::packet::PacketSocket;
use kvmmem_broker::peer::{Credentials, Peer};
use kvmmem_broker::ram::Ram;
use kvmmem_broker::scope::Rights;
use kvmmem_broker::server::Server;
use kvmmem_sys::ram::GuestRam;
use memchr::memmem::Finder;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

const RAM: u64 = 1 << 30;
const PIECE: usize = 256 << 10;
const ROUNDS: usize = 9;
const GOAL: f64 = 1.5;
/// What the broker copies goes through two processes.
const COPIED_GOAL: f64 = 0.5;
/// Present once, at the very end, so that a search goes through everything.
const NEEDLE: &[u8; 24] = b"kvmmem looks for exactly";

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

fn main() -> Result<()> {
    // The VMM's part: this program once more, with the RAM mapped, saying where.
    if std::env::args().any(|argument| argument == "--vmm") {
        return vmm();
    }
    let mut child = Command::new(std::env::current_exe()?)
        .arg("--vmm")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut words = [0; 16];
    child.stdout.as_mut().ok_or("no output")?.read_exact(&mut words)?;
    let [address, fd] = [&words[..8], &words[8..]].map(|word| word.try_into().map(u64::from_le_bytes));
    let (address, fd) = (usize::try_from(address?)?, fd?);
    let ram: OwnedFd = std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(format!("/proc/{}/fd/{fd}", child.id()))?
        .into();

    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("broker.sock");
    let server = Server::bind(&socket, None)?;
    let state = server.broker();
    let (stop, stopped) = UnixStream::pair()?;
    let broker = std::thread::spawn(move || server.run(stopped.as_fd()));
    let link = VmmLink::connect(&socket, registration("shared", 1), Some(ram))?;
    let view = attach(&socket, "shared")?;
    register_private(&state, child.id(), address)?;
    let copied = attach(&socket, "private")?;
    let pid = Pid::from_raw(i32::try_from(child.id())?);

    let whole = Range { gpa: 0, len: RAM };
    let kept = view.map(whole)?;
    let (mut anew, mut again, mut copies, mut theirs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let times = [
            timed(|| {
                let mapping = view.map(whole)?;
                search(|at, part| read_mapping(&mapping, at, part))
            })?,
            timed(|| search(|at, part| read_mapping(&kept, at, part)))?,
            timed(|| search(|at, part| Ok(copied.read_at(at, part)?)))?,
            timed(|| search(|at, part| read_process(pid, address, at, part)))?,
        ];
        // The first round warms up.
        if round > 0 {
            for (series, time) in [&mut anew, &mut again, &mut copies, &mut theirs].into_iter().zip(times) {
                series.push(time);
            }
        }
    }
    report("scan of 1 GiB on the host, mapped anew, against process_vm_readv", GOAL, &mut anew, &mut theirs);
    report(
        "scan of 1 GiB on the host, mapping kept, against process_vm_readv",
        GOAL,
        &mut again,
        &mut theirs,
    );
    report(
        "scan of 1 GiB of private RAM on the host, against process_vm_readv",
        COPIED_GOAL,
        &mut copies,
        &mut theirs,
    );
    drop(kept);

    drop((view, copied, link, state, stop));
    broker.join().map_err(|_| "the broker failed")??;
    drop(child.stdin.take());
    child.wait()?;
    Ok(())
}

fn attach(socket: &Path, target: &str) -> Result<View> {
    let granted = Admin::connect(socket)?.grant(&GrantRequest {
        target: target.into(),
        spans: None,
        rights: Rights::ReadOnly,
        ttl_ms: 60_000,
        uses: 1,
        holder: None,
        label: None,
    })?;
    Ok(View::attach_host(socket, &granted.token, Access::ReadOnly)?)
}

/// Registers the same RAM as one that nobody can map.
fn register_private(broker: &Broker, vmm: u32, address: usize) -> Result<()> {
    let memory = std::fs::OpenOptions::new().read(true).write(true).open(format!("/proc/{vmm}/mem"))?;
    let region = Region { gpa: 0, len: RAM, offset: address as u64, file: 0 };
    let ram = Ram::of_process(memory.into(), vec![region])?;
    let flags = SocketFlags::CLOEXEC;
    let (socket, _) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    let socket = PacketSocket::accepted(socket, Duration::from_secs(1))?;
    let peer = Peer::new(socket, Credentials { pid: vmm, uid: 0 });
    let registration = Registration { regions: Vec::new(), ..registration("private", 2) };
    let by = peer.credentials();
    broker.registry().insert(registration, &mut Some(ram), Arc::new(peer), by)?;
    Ok(())
}

/// Holds the RAM, every page of it in place as a guest's stores would have put it there, until standard input ends.
fn vmm() -> Result<()> {
    let ram = GuestRam::new(RAM)?;
    let mut piece = vec![0x5a; PIECE];
    for (index, byte) in piece.iter_mut().enumerate() {
        *byte ^= u8::try_from(index.wrapping_mul(0x9e37) >> 3 & 0xff)?;
    }
    for at in (0..RAM).step_by(PIECE) {
        ram.memory().write_slice(&piece, GuestAddress(at))?;
    }
    ram.memory().write_slice(NEEDLE, GuestAddress(RAM - NEEDLE.len() as u64))?;
    let address = ram.memory().get_host_address(GuestAddress(0))?.addr() as u64;
    let fd = std::os::fd::AsRawFd::as_raw_fd(&ram.fd());
    let mut out = std::io::stdout();
    out.write_all(&address.to_le_bytes())?;
    out.write_all(&u64::try_from(fd)?.to_le_bytes())?;
    out.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

fn read_mapping(mapping: &Mapping, at: u64, part: &mut [u8]) -> Result<()> {
    Ok(mapping.read(at, part)?)
}

fn read_process(pid: Pid, address: usize, at: u64, part: &mut [u8]) -> Result<()> {
    let remote = RemoteIoVec { base: address + usize::try_from(at)?, len: part.len() };
    let expected = part.len();
    let count = process_vm_readv(pid, &mut [IoSliceMut::new(part)], &[remote])?;
    if count == expected { Ok(()) } else { Err("short read".into()) }
}

/// Copies and searches every piece; the needle must be found once.
fn search(read: impl Fn(u64, &mut [u8]) -> Result<()>) -> Result<()> {
    let finder = Finder::new(NEEDLE);
    let mut piece = vec![0; PIECE];
    let mut found = 0;
    for at in (0..RAM).step_by(PIECE) {
        read(at, &mut piece)?;
        found += finder.find_iter(&piece).count();
    }
    if found == 1 { Ok(()) } else { Err(format!("found {found} needles").into()) }
}

fn timed(act: impl FnOnce() -> Result<()>) -> Result<u64> {
    let began = Instant::now();
    act()?;
    Ok(u64::try_from(began.elapsed().as_nanos())?)
}

fn report(name: &str, goal: f64, ours: &mut [u64], theirs: &mut [u64]) {
    let percentile = |times: &mut [u64], percent: usize| {
        times.sort_unstable();
        times.get(times.len() * percent / 100).copied().unwrap_or(0)
    };
    let [p50, p99] = [50, 99].map(|percent| percentile(ours, percent));
    let peer = percentile(theirs, 50);
    let ratio = peer as f64 / p50 as f64;
    if std::env::args().any(|argument| argument == "--json") {
        println!(
            "{{\"name\":\"{name}\",\"ratio\":{ratio:.3},\"goal\":{goal},\"better\":\"higher\",\"p50_ns\":{p50},\"p99_ns\":{p99}}}"
        );
    } else {
        println!(
            "{name}: p50 {p50} ns, p99 {p99} ns; peer p50 {peer} ns; {ratio:.2} times as fast, goal {goal}"
        );
    }
}

fn registration(name: &str, number: u8) -> Registration {
    Registration {
        name: name.into(),
        uuid: Uuid::from_bytes([number; 16]),
        vcpus: 1,
        start_time_ms: 0,
        cid: None,
        introspectable: true,
        introspector: false,
        regions: vec![Region { gpa: 0, len: RAM, offset: 0, file: 0 }],
    }
}
