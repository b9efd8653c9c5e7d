// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A broker in this process and a target without a guest.
#![allow(dead_code, reason = "each test program uses its own part")]

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::thread::JoinHandle;
use std::time::Duration;

use kvmmem::{Access, Token, View, ViewError};
use kvmmem_broker::{Limits, Server};
use kvmmem_client::admin::{Admin, GrantRequest, NewGrant, Rights, Span};
use kvmmem_client::vmm::{Region, VmIdentity, VmmLink};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};
use uuid::Uuid;

pub(crate) const PAGE: u64 = 0x1000;
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Four pages from 0, two from 1 MiB that lie before them in the file.
pub(crate) const REGIONS: [Region; 2] = [
    Region { gpa: 0, len: 4 * PAGE, offset: 2 * PAGE, file: 0 },
    Region { gpa: 0x10_0000, len: 2 * PAGE, offset: 0, file: 0 },
];

/// A broker and a target, which end on drop.
pub(crate) struct Host {
    pub(crate) socket: PathBuf,
    pub(crate) ram: File,
    pub(crate) target: Option<VmmLink>,
    stop: Option<UnixStream>,
    server: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Host {
    /// A target in whose RAM every word holds its own address.
    pub(crate) fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("broker.sock");
        // A slow machine is waited for.
        let limits = Limits { confirmation: PATIENCE, ..Limits::default() };
        let server = Server::bind_with(&socket, None, limits).unwrap();
        let (stop, stopped) = UnixStream::pair().unwrap();
        let server = std::thread::spawn(move || server.run(stopped.as_fd()).unwrap());
        let fd = memfd_create("ram", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
        let ram = File::from(fd);
        ram.set_len(8 * PAGE).unwrap();
        fcntl_add_seals(&ram, SealFlags::SHRINK).unwrap();
        for region in REGIONS {
            for at in (0..region.len).step_by(8) {
                ram.write_all_at(&(region.gpa + at).to_le_bytes(), region.offset + at).unwrap();
            }
        }
        let registration = VmIdentity {
            start_time_ms: 1_700_000_000_000,
            ..VmIdentity::target("target", Uuid::from_bytes([7; 16]))
        }
        .registered(REGIONS.to_vec());
        let fd = ram.try_clone().unwrap().into();
        let target = VmmLink::connect(&socket, registration, Some(fd)).unwrap();
        Self {
            socket,
            ram,
            target: Some(target),
            stop: Some(stop),
            server: Some(server),
            _directory: directory,
        }
    }

    pub(crate) fn admin(&self) -> Admin {
        let mut admin = Admin::connect(&self.socket).unwrap();
        admin.limit_answers(PATIENCE).unwrap();
        admin
    }

    pub(crate) fn grant(&self, rights: Rights, spans: Option<Vec<Span>>) -> NewGrant {
        self.grant_to(rights, spans, None)
    }

    pub(crate) fn grant_to(
        &self,
        rights: Rights,
        spans: Option<Vec<Span>>,
        holder: Option<Uuid>,
    ) -> NewGrant {
        let request = GrantRequest {
            target: "target".into(),
            spans,
            rights,
            ttl_ms: 60_000,
            uses: 1,
            holder,
            label: None,
        };
        self.admin().grant(&request).unwrap()
    }

    pub(crate) fn attach(&self, token: &Token) -> Result<View, ViewError> {
        View::attach_host(&self.socket, token, Access::Granted)
    }

    pub(crate) fn view(&self, rights: Rights) -> (View, u64) {
        let granted = self.grant(rights, None);
        (self.attach(&granted.token).unwrap(), granted.grant)
    }

    pub(crate) fn end_broker(&mut self) {
        drop(self.stop.take());
        if let Some(server) = self.server.take() {
            server.join().unwrap();
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.target = None;
        self.end_broker();
    }
}
