// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A broker, the VMs that are registered with it, and their grants.

use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use kvmmem_client::admin::{Admin, GrantRequest, Rights, Token};
use kvmmem_client::vmm::{Region, Registration, VmIdentity, VmmLink};
use kvmmem_proto::client::ClientError;
use kvmmem_proto::message::{Answer, Call, FromBroker, Refusal, Request};
use kvmmem_proto::packet::{PacketBuffer, PacketSocket, Wait};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, ftruncate, memfd_create};
use uuid::Uuid;

use crate::Result;

const RAM: u64 = 2 << 20;
const LIMIT: Duration = Duration::from_secs(30);

/// A `kvmmemd` of its own, ended on drop.
pub(crate) struct Workspace {
    broker: Child,
    socket: PathBuf,
    /// The targets' connections, by number.
    targets: Vec<PacketSocket>,
    tokens: Vec<Token>,
    _directory: tempfile::TempDir,
}

impl Workspace {
    /// Starts a broker that writes an audit log, as an installed one does.
    pub(crate) fn open() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let socket = directory.path().join("broker.sock");
        let broker = Command::new(env!("CARGO_BIN_EXE_kvmmemd"))
            .args(["--log", "warn", "--socket"])
            .arg(&socket)
            .arg("--audit")
            .arg(directory.path().join("audit.log"))
            .spawn()?;
        let workspace =
            Self { broker, socket, targets: Vec::new(), tokens: Vec::new(), _directory: directory };
        let began = Instant::now();
        while Admin::connect(&workspace.socket).is_err() {
            if began.elapsed() > LIMIT {
                return Err("the broker does not listen".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(workspace)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.broker.id()
    }

    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// Registers so many more targets.
    pub(crate) fn fill(&mut self, count: usize) -> Result<()> {
        let mut buffer = PacketBuffer::default();
        for number in self.targets.len()..self.targets.len() + count {
            let socket = PacketSocket::connect(&self.socket, LIMIT)?;
            let call = Call::Register(registration(number, &name(number)));
            // The broker alone keeps the memfd.
            socket.send(&Request { id: 1, call }, &[ram()?.as_fd()], Wait::Limited)?;
            let answer = socket.receive(&mut buffer)?;
            match answer {
                Some((FromBroker::Answer { answer: Answer::Registered { .. }, .. }, _)) => {}
                other => return Err(format!("target {number} is not registered: {other:?}").into()),
            }
            self.targets.push(socket);
        }
        Ok(())
    }

    /// Waits until no connection has a thread.
    pub(crate) fn wait_until_idle(&self) -> Result<()> {
        let began = Instant::now();
        while self.has_peer_thread()? {
            if began.elapsed() > LIMIT {
                return Err("idle connections keep their threads".into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn has_peer_thread(&self) -> Result<bool> {
        for task in std::fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            // A thread that has ended meanwhile has no name.
            let name = std::fs::read_to_string(task?.path().join("comm")).unwrap_or_default();
            if name.trim_end() == "peer" {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Makes so many grants, for one target after the other.
    pub(crate) fn grant(&mut self, count: usize) -> Result<()> {
        let mut admin = Admin::connect(&self.socket)?;
        for number in 0..count {
            let request = GrantRequest {
                target: name(number % self.targets.len()),
                spans: None,
                rights: Rights::ReadOnly,
                ttl_ms: 3_600_000,
                uses: u32::MAX,
                holder: None,
                label: Some(format!("grant {number}")),
            };
            self.tokens.push(admin.grant(&request)?.token);
        }
        Ok(())
    }

    /// The token of one grant or another: each in its turn, neighbours far from each other.
    pub(crate) fn token(&self, n: usize) -> &Token {
        const STRIDE: usize = 7_919;
        &self.tokens[n * STRIDE % self.tokens.len()]
    }

    /// Registers a VM that may map the memory of the others.
    pub(crate) fn introspector(&self, name: &str) -> Result<VmmLink> {
        let deadline = Instant::now() + LIMIT;
        loop {
            let lion = VmIdentity {
                cid: Some(3),
                introspectable: false,
                introspector: true,
                ..registration(usize::MAX, name).identity
            };
            match VmmLink::connect(&self.socket, lion.registered(Vec::new()), None) {
                // The broker has not read yet that the one before has ended.
                Err(ClientError::Refused { refusal: Refusal::Exists, .. })
                    if Instant::now() < deadline =>
                {
                    std::thread::sleep(Duration::from_millis(1));
                }
                link => return Ok(link?),
            }
        }
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        // Nothing is left to do where it has ended by itself.
        let _ = self.broker.kill();
        let _ = self.broker.wait();
    }
}

fn name(number: usize) -> String {
    format!("target-{number}")
}

fn registration(number: usize, name: &str) -> Registration {
    let region = Region { gpa: 0, len: RAM, offset: 0, file: 0 };
    VmIdentity::target(name, Uuid::from_u64_pair(1, number as u64)).registered(vec![region])
}

fn ram() -> Result<OwnedFd> {
    let fd = memfd_create("bench", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    ftruncate(&fd, RAM)?;
    fcntl_add_seals(&fd, SealFlags::SHRINK)?;
    Ok(fd)
}
