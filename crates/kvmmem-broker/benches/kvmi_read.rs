// SPDX-License-Identifier: Apache-2.0 OR MIT
//! READ_PHYSICAL of a page over a unix socket, against a bare ping-pong of the same bytes over the
//! same kind of socket: a thread that answers each request with that page of its own memory, and
//! does nothing else.
//!
//! Prints one line; with `--json` one object: name, ratio, goal, better, p50_ns, p99_ns.
#![deny(unsafe_code)]

use std::io::{IoSlice, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Instant;

use kvmmem_broker::Server;
use kvmmem_client::admin::Admin;
use kvmmem_client::vmm::{Region, Registration, VmIdentity, VmmLink};
use kvmmem_kvmi::handshake::{ToolHello, VmHello};
use kvmmem_kvmi::request::Request;
use kvmmem_proto::endpoint::Endpoint;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};
use uuid::Uuid;

const RAM: u64 = 64 << 20;
const REQUEST: usize = 24;
const REPLY: usize = 16 + 4096;
/// Both sides take turns, so that other load of the machine meets both.
const ROUNDS: usize = 60;
const READS_PER_ROUND: usize = 500;
const GOAL: f64 = 1.3;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // One CPU for all threads: else the times are those of waking another CPU, or not, as the
    // scheduler likes.
    let mut cpu = CpuSet::new();
    cpu.set(sched_getcpu());
    sched_setaffinity(None, &cpu)?;
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("broker.sock");
    let server = Server::bind(&socket, None)?;
    let (stop, stopped) = UnixStream::pair()?;
    let broker = std::thread::spawn(move || server.run(stopped.as_fd()));
    let link = VmmLink::connect(&socket, registration(), Some(ram()?))?;
    let path = directory.path().join("tool.sock");
    let listener = UnixListener::bind(&path)?;
    Admin::connect(&socket)?.hook("bench", &Endpoint::Unix(path))?;
    let (mut kvmi, _) = listener.accept()?;
    VmHello::receive(&mut kvmi)?;
    ToolHello::default().send(&mut kvmi)?;

    let (mut bare, mut echo) = UnixStream::pair()?;
    let memory = vec![0x5a; usize::try_from(RAM)?];
    let ponger = std::thread::spawn(move || while pong(&mut echo, &memory).is_some() {});

    let (mut reads, mut pings) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        exchange(&mut kvmi, &mut reads)?;
        exchange(&mut bare, &mut pings)?;
        // The first round warms up.
        if round == 0 {
            reads.clear();
            pings.clear();
        }
    }
    report(&mut reads, &mut pings);

    drop((kvmi, bare, link, stop));
    ponger.join().map_err(|_| "the bare side failed")?;
    broker.join().map_err(|_| "the broker failed")??;
    Ok(())
}

/// Answers one request on the bare side: the request's gpa picks the page.
fn pong(stream: &mut UnixStream, memory: &[u8]) -> Option<()> {
    let mut request = [0; REQUEST];
    stream.read_exact(&mut request).ok()?;
    let gpa = usize::try_from(u64::from_le_bytes(*request.get(8..)?.first_chunk()?)).ok()?;
    let reply = [IoSlice::new(&[0; REPLY - 4096]), IoSlice::new(memory.get(gpa..gpa + 4096)?)];
    (stream.write_vectored(&reply).ok()? == REPLY).then_some(())
}

/// Times requests for pages all over the RAM; the bare side sends and gets the same bytes.
fn exchange(
    stream: &mut UnixStream,
    times: &mut Vec<u64>,
) -> Result<(), Box<dyn std::error::Error>> {
    let (mut request, mut reply) = (Vec::with_capacity(REQUEST), vec![0; REPLY]);
    for n in 0..READS_PER_ROUND as u64 {
        request.clear();
        let gpa = (n.wrapping_mul(0x9e37_79b9_7f4a_7c15) % RAM) & !0xfff;
        Request::ReadPhysical { gpa, size: 4096 }
            .encode(0, &mut request)
            .map_err(|error| format!("{error:?}"))?;
        let began = Instant::now();
        stream.write_all(&request)?;
        stream.read_exact(&mut reply)?;
        times.push(u64::try_from(began.elapsed().as_nanos())?);
    }
    Ok(())
}

fn report(reads: &mut [u64], pings: &mut [u64]) {
    let percentile = |times: &mut [u64], percent: usize| {
        times.sort_unstable();
        times.get(times.len() * percent / 100).copied().unwrap_or(0)
    };
    let [p50, p99] = [50, 99].map(|percent| percentile(reads, percent));
    let bare = percentile(pings, 50);
    let ratio = p50 as f64 / bare as f64;
    let name = "kvmi-read-4k";
    if std::env::args().any(|argument| argument == "--json") {
        println!(
            "{{\"name\":\"{name}\",\"ratio\":{ratio:.3},\"goal\":{GOAL},\"better\":\"lower\",\"p50_ns\":{p50},\"p99_ns\":{p99}}}"
        );
    } else {
        println!(
            "{name}: p50 {p50} ns, p99 {p99} ns; bare p50 {bare} ns; ratio {ratio:.2}, goal at most {GOAL}"
        );
    }
}

fn ram() -> Result<std::os::fd::OwnedFd, Box<dyn std::error::Error>> {
    let fd = memfd_create("bench", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, RAM)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK)?;
    // As in a running guest, every page is there.
    let page = [0x5a; 4096];
    for gpa in (0..RAM).step_by(page.len()) {
        rustix::io::pwrite(&fd, &page, gpa)?;
    }
    Ok(fd)
}

fn registration() -> Registration {
    let region = Region { gpa: 0, len: RAM, offset: 0, file: 0 };
    VmIdentity::target("bench", Uuid::from_bytes([1; 16])).registered(vec![region])
}
