// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A broker in this process with one registered virtual machine, and the command line.
#![allow(dead_code, reason = "each test program uses its own part")]

pub(crate) mod blocked;
pub(crate) mod qemu;

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvmmem_broker::{Broker, Server, ServerError};
use kvmmem_client::vmm::{Change, Region, Registration, Vcpus, VmIdentity, VmmLink};
use kvmmem_sys::ram::GuestRam;
use rustix::process::{Pid, Signal, kill_process};
use uuid::Uuid;
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend, MmapRegion};

pub(crate) const UUID: Uuid = Uuid::from_u128(0x0011_2233_4455_4677_8899_aabb_ccdd_eeff);

/// A broker with one target, named victim.
pub(crate) struct Host {
    directory: tempfile::TempDir,
    pub(crate) vm: Option<VmmLink>,
    pub(crate) ram: GuestRam,
    regions: Vec<Region>,
    stop: Option<UnixStream>,
    server: Option<JoinHandle<Result<(), ServerError>>>,
    /// What a VMM that keeps its RAM to itself has mapped.
    _mapping: Option<MmapRegion>,
}

/// What a verb printed, and how it ended.
pub(crate) struct Ended {
    pub(crate) code: Option<i32>,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Host {
    pub(crate) fn start(regions: &[Region]) -> Self {
        Self::with(regions, Kind::Shared)
    }

    /// One whose VMM answers questions about its vCPUs.
    pub(crate) fn start_answering(regions: &[Region], vcpus: &Arc<impl Vcpus + 'static>) -> Self {
        Self::with(regions, Kind::Answering(Arc::downgrade(vcpus) as Weak<dyn Vcpus>))
    }

    /// One whose VMM, which is this process, keeps its RAM to itself.
    pub(crate) fn start_private(regions: &[Region]) -> Self {
        Self::with(regions, Kind::Private)
    }

    /// One of this file, which its VMM has mapped and keeps to itself. Where the file gets shorter,
    /// memory is missing.
    pub(crate) fn start_file(regions: &[Region], file: &File) -> Self {
        Self::with(regions, Kind::File(file.try_clone().unwrap()))
    }

    fn with(regions: &[Region], kind: Kind) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("broker.sock");
        let (broker, stop, server) = serve(&socket);

        let size = regions.iter().map(|region| region.offset + region.len).max().unwrap();
        let ram = GuestRam::new(size).unwrap();
        let (mut vm, mut mapping) = (None, None);
        match kind {
            Kind::Shared => vm = Some(register(&socket, regions, &ram)),
            Kind::Answering(vcpus) => {
                let registration = Registration { vcpu_questions: true, ..registration(regions) };
                let fd = ram.fd().try_clone_to_owned().unwrap();
                let link = VmmLink::connect(&socket, registration, Some(fd)).unwrap();
                link.set_vcpus(vcpus);
                vm = Some(link);
            }
            Kind::Private => {
                let hva =
                    ram.memory().get_host_address(GuestAddress(0)).unwrap().expose_provenance();
                register_private(&broker, registration(regions), hva as u64);
            }
            Kind::File(file) => {
                let len = usize::try_from(size).unwrap();
                let region = MmapRegion::from_file(FileOffset::new(file, 0), len).unwrap();
                register_private(
                    &broker,
                    registration(regions),
                    region.as_ptr().expose_provenance() as u64,
                );
                mapping = Some(region);
            }
        }
        let (stop, server) = (Some(stop), Some(server));
        Self { directory, vm, ram, regions: regions.to_vec(), stop, server, _mapping: mapping }
    }

    /// Ends the broker and starts another one in its place; returns once the target is registered
    /// there.
    pub(crate) fn next_broker(&mut self) {
        drop(self.stop.take());
        self.server.take().unwrap().join().unwrap().unwrap();
        let (broker, stop, server) = serve(&self.path("broker.sock"));
        (self.stop, self.server) = (Some(stop), Some(server));
        let generation = |_: &Path| {
            self.vm.as_ref().is_none_or(VmmLink::is_connected) && broker.number("victim").is_some()
        };
        wait_for(Path::new("the target"), generation);
    }

    /// Starts the target again: another registration with the same UUID and RAM.
    pub(crate) fn restart_target(&mut self) {
        drop(self.vm.take());
        let gone = |_: &Path| {
            self.run(&["target", "list"]).stdout.lines().all(|line| !line.contains("victim"))
        };
        wait_for(Path::new("the target to go"), gone);
        self.vm = Some(register(&self.path("broker.sock"), &self.regions, &self.ram));
    }

    /// Resets the target. What the broker is asked to do after this, each view is told later.
    pub(crate) fn reset(&self) {
        let (_, token) = self.grant(&[]);
        let mut view = self.view(&token, &["attach", "--hold"]).spawn().unwrap();
        let mut lines = BufReader::new(view.stdout.take().unwrap()).lines();
        let mut until = |word: &str| lines.find(|line| line.as_ref().unwrap().starts_with(word));
        until("attached").unwrap().unwrap();
        self.vm.as_ref().unwrap().ram_changed(self.regions.clone(), Change::Reset);
        until("changed").unwrap().unwrap();
        view.kill().unwrap();
        view.wait().unwrap();
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("unix:{}", self.path("tool.sock").display())
    }

    /// Puts bytes into the target's memory.
    pub(crate) fn put(&self, gpa: u64, bytes: &[u8]) {
        for (gpa, byte) in (gpa..).zip(bytes) {
            let region = self
                .regions
                .iter()
                .find(|region| (region.gpa..region.gpa + region.len).contains(&gpa));
            let region = region.unwrap_or_else(|| panic!("no memory at {gpa:#x}"));
            rustix::io::pwrite(self.ram.fd(), &[*byte], region.offset + (gpa - region.gpa))
                .unwrap();
        }
    }

    /// Blocks of the target's memory that the host has allocated.
    pub(crate) fn allocated(&self) -> i64 {
        rustix::fs::fstat(self.ram.fd()).unwrap().st_blocks
    }

    /// The command line, apart from this process's environment, with this broker.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kvmmem"));
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        for variable in ["KVMMEM_KVMI_PORT", "KVMMEM_TOKEN", "RUST_LOG", "CLICOLOR_FORCE"] {
            command.env_remove(variable);
        }
        command
            .env("KVMMEM_BROKER", self.path("broker.sock"))
            .env("KVMMEM_DEVICE", "/nonexistent/kvmmem");
        command
    }

    pub(crate) fn run(&self, arguments: &[&str]) -> Ended {
        finish(self.command(arguments).spawn().unwrap())
    }

    /// Runs a verb that asks the broker, and wants it to succeed.
    #[track_caller]
    pub(crate) fn ask(&self, arguments: &[&str]) -> String {
        let ended = self.run(arguments);
        assert_eq!(ended.code, Some(0), "{arguments:?}: {}", ended.stderr);
        ended.stdout
    }

    /// As [`Self::ask`]; the one object that was printed.
    #[track_caller]
    pub(crate) fn ask_json(&self, arguments: &[&str]) -> serde_json::Value {
        serde_json::from_str(&self.ask(&[arguments, &["--json"]].concat())).unwrap()
    }

    /// Grants access to the target; the grant's number and token.
    #[track_caller]
    pub(crate) fn grant(&self, arguments: &[&str]) -> (String, String) {
        let granted = self.ask_json(&[&["grant", "create", "victim"], arguments].concat());
        (granted["grant"].to_string(), granted["token"].as_str().unwrap().to_owned())
    }

    /// A verb on a view by the token.
    pub(crate) fn view(&self, token: &str, arguments: &[&str]) -> Command {
        let mut command = self.command(arguments);
        command.env("KVMMEM_TOKEN", token);
        command
    }

    /// Runs a verb on a view with a token of a grant with these arguments.
    #[track_caller]
    pub(crate) fn look(&self, grant: &[&str], arguments: &[&str]) -> Ended {
        let (_, token) = self.grant(grant);
        finish(self.view(&token, arguments).spawn().unwrap())
    }
}

/// How the target has its RAM.
enum Kind {
    Shared,
    Answering(Weak<dyn Vcpus>),
    Private,
    File(File),
}

type Serving = (Arc<Broker>, UnixStream, JoinHandle<Result<(), ServerError>>);

/// Starts a broker.
fn serve(socket: &Path) -> Serving {
    let server = Server::bind(socket, None).unwrap();
    // Another broker of this machine may listen there.
    server.service().set_guest_port(None);
    let broker = Arc::clone(server.service().broker());
    let (stop, stopped) = UnixStream::pair().unwrap();
    (broker, stop, std::thread::spawn(move || server.run(stopped.as_fd())))
}

fn registration(regions: &[Region]) -> Registration {
    let vm = VmIdentity { vcpus: 2, ..VmIdentity::target("victim", UUID) };
    vm.registered(regions.to_vec())
}

fn register(socket: &Path, regions: &[Region], ram: &GuestRam) -> VmmLink {
    let fd = ram.fd().try_clone_to_owned().unwrap();
    VmmLink::connect(socket, registration(regions), Some(fd)).unwrap()
}

/// Registers a VM whose RAM this process has mapped at an address.
fn register_private(broker: &Broker, registration: Registration, hva: u64) {
    let place = |region: &Region| Region { offset: hva + region.offset, ..*region };
    let regions = registration.regions.iter().map(place).collect();
    let memory = File::options().read(true).write(true).open("/proc/self/mem").unwrap();
    let registration = Registration { regions, ..registration };
    broker.register_private(registration, memory.into(), std::process::id()).unwrap();
}

impl Drop for Host {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.server.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            ended.unwrap().unwrap().unwrap();
        }
    }
}

pub(crate) fn finish(child: Child) -> Ended {
    let output = child.wait_with_output().unwrap();
    Ended {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

pub(crate) fn signal(child: &Child, signal: Signal) {
    kill_process(Pid::from_child(child), signal).unwrap();
}

/// Waits until something holds, at most a minute.
#[track_caller]
pub(crate) fn wait_for(what: &Path, mut holds: impl FnMut(&Path) -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds(what) {
        assert!(Instant::now() < deadline, "still waiting for {}", what.display());
        std::thread::sleep(Duration::from_millis(1));
    }
}
