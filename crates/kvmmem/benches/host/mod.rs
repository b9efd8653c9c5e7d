// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A VMM with 1 GiB of RAM, a broker and two views of it for benchmarks on the host: through the
//! memfd, and through copies as if the RAM were private. VMM and broker are this program once more,
//! each a process of its own.

use std::error::Error;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use kvmmem::{Access, View};
use kvmmem_broker::{Broker, Server};
use kvmmem_client::admin::{Admin, GrantRequest};
use kvmmem_client::vmm::{Region, Registration, VmIdentity, VmmLink};
use kvmmem_proto::scope::Rights;
use kvmmem_sys::ram::GuestRam;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};
use nix::unistd::Pid;
use uuid::Uuid;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

pub(crate) const RAM: u64 = 1 << 30;
pub(crate) const PIECE: usize = 256 << 10;
/// The RAM's last bytes, and there alone, so that a search goes through everything.
pub(crate) const NEEDLE: &[u8; 24] = b"kvmmem looks for exactly";

pub(crate) type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

/// The processes and the views.
pub(crate) struct Host {
    /// View of RAM that is mapped.
    pub(crate) shared: View,
    /// View of the same RAM by copies.
    pub(crate) private: View,
    pub(crate) pid: Pid,
    /// Where the RAM is in the VMM.
    pub(crate) address: usize,
    _link: VmmLink,
    broker: Child,
    vmm: Child,
    _directory: tempfile::TempDir,
}

impl Host {
    /// Starts everything; `None` in the VMM and in the broker when they have done their part.
    pub(crate) fn start() -> Result<Option<Self>> {
        let words: Vec<String> = std::env::args().collect();
        let part = words.iter().position(|word| word == "--vmm" || word == "--broker");
        match part.map(|at| words.get(at..).unwrap_or_default()) {
            Some([_]) => return vmm().map(|()| None),
            Some([_, socket, pid, address]) => {
                return broker(Path::new(socket), pid.parse()?, address.parse()?).map(|()| None);
            }
            _ => {}
        }
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("broker.sock");
        let mut vmm = spawn(&["--vmm".into()])?;
        let mut words = [0; 16];
        vmm.stdout.as_mut().ok_or("no output")?.read_exact(&mut words)?;
        let [address, fd] =
            [&words[..8], &words[8..]].map(|word| word.try_into().map(u64::from_le_bytes));
        let (address, fd) = (usize::try_from(address?)?, fd?);
        let ram: OwnedFd = std::fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(format!("/proc/{}/fd/{fd}", vmm.id()))?
            .into();
        let arguments = [socket.display().to_string(), vmm.id().to_string(), address.to_string()];
        let mut broker = spawn(&[&["--broker".to_owned()][..], &arguments].concat())?;
        broker.stdout.as_mut().ok_or("no output")?.read_exact(&mut [0])?;
        let link = VmmLink::connect(&socket, registration("shared", 1), Some(ram))?;
        Ok(Some(Self {
            shared: attach(&socket, "shared")?,
            private: attach(&socket, "private")?,
            pid: Pid::from_raw(i32::try_from(vmm.id())?),
            address,
            _link: link,
            broker,
            vmm,
            _directory: directory,
        }))
    }

    /// Reads as other tools do, from the VMM's memory.
    pub(crate) fn read_process(&self, at: u64, part: &mut [u8]) -> Result<()> {
        let remote = RemoteIoVec { base: self.address + usize::try_from(at)?, len: part.len() };
        let expected = part.len();
        let count = process_vm_readv(self.pid, &mut [IoSliceMut::new(part)], &[remote])?;
        if count == expected { Ok(()) } else { Err("short read".into()) }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for child in [&mut self.broker, &mut self.vmm] {
            drop(child.stdin.take());
            let _ = child.wait();
        }
    }
}

fn spawn(arguments: &[String]) -> Result<Child> {
    let mut command = Command::new(std::env::current_exe()?);
    Ok(command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?)
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

/// Registers the same RAM as one that cannot be mapped.
fn register_private(broker: &Broker, vmm: u32, address: usize) -> Result<()> {
    let memory =
        std::fs::OpenOptions::new().read(true).write(true).open(format!("/proc/{vmm}/mem"))?;
    let region = Region { gpa: 0, len: RAM, offset: address as u64, file: 0 };
    let registration = Registration { regions: vec![region], ..registration("private", 2) };
    broker.register_private(registration, memory.into(), vmm)?;
    Ok(())
}

/// Serves until standard input ends.
fn broker(socket: &Path, vmm: u32, address: usize) -> Result<()> {
    let server = Server::bind(socket, None)?;
    register_private(server.service().broker(), vmm, address)?;
    let (stop, stopped) = UnixStream::pair()?;
    let serving = std::thread::spawn(move || server.run(stopped.as_fd()));
    let mut out = std::io::stdout();
    out.write_all(b"!")?;
    out.flush()?;
    std::io::stdin().read_to_end(&mut Vec::new())?;
    drop(stop);
    serving.join().map_err(|_| "the broker failed")??;
    Ok(())
}

/// Holds the RAM, every page of it in place as a guest's stores would have put it there, until
/// standard input ends.
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

pub(crate) fn timed(act: impl FnOnce() -> Result<()>) -> Result<u64> {
    let began = Instant::now();
    act()?;
    Ok(u64::try_from(began.elapsed().as_nanos())?)
}

/// Prints how many times as fast `ours` is as `theirs`.
pub(crate) fn report(name: &str, goal: f64, ours: &mut [u64], theirs: &mut [u64]) {
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
    let region = Region { gpa: 0, len: RAM, offset: 0, file: 0 };
    VmIdentity::target(name, Uuid::from_bytes([number; 16])).registered(vec![region])
}
