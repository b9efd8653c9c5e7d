// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The broker's core inside one command of root's, where no broker runs: `--target` needs no daemon
//! then.
//!
//! The virtual machine is added, granted and attached by the same code and the same checks as in
//! `kvmmemd`, and the audit lines go to the journal, or to standard error. A target without a UUID
//! of its own, and its RAM, get numbers from the VMM's process: the broker of the next command
//! gives the same ones, so that `dump --resume` continues. The socket is unlinked once the view is
//! attached, so that only this process is served and no file remains if it is killed.

use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use kvmmem_broker::Server;
use kvmmem_client::ClientError;
use kvmmem_client::admin::{Admin, Which};
use kvmmem_proto::packet::PacketError;
use kvmmem_qemu::discover::{HostVm, discover};
use rustix::io::Errno;
use tempfile::TempDir;
use uuid::Uuid;

use crate::target_name::TargetName;

/// How long a command waits for its own broker before it ends.
const END_LIMIT: Duration = Duration::from_secs(1);

type Wait = Box<dyn FnOnce(Duration) + Send>;

/// What [`finish`] waits for: one for each broker that was started.
static BROKERS: Mutex<Vec<Wait>> = Mutex::new(Vec::new());

fn lock() -> MutexGuard<'static, Vec<Wait>> {
    BROKERS.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Waits until this process's brokers have seen the end of its views: the process's end would come
/// before the last lines of the audit log.
pub(crate) fn finish() {
    let brokers = std::mem::take(&mut *lock());
    brokers.into_iter().for_each(|wait| wait(END_LIMIT));
}

/// Whether no broker listens at the socket.
pub(crate) fn is_absent(error: &ClientError) -> bool {
    let ClientError::Connect { source: PacketError::Connect(errno), .. } = error else {
        return false;
    };
    matches!(*errno, Errno::NOENT | Errno::NOTDIR | Errno::CONNREFUSED)
}

/// A broker of this process with one target. It serves what has connected until the process ends,
/// and no new connection once this is dropped.
pub(crate) struct Embedded {
    pub(crate) admin: Admin,
    /// UUID of the target.
    pub(crate) target: Uuid,
    /// Where it listens.
    pub(crate) socket: PathBuf,
    /// Why it has no connection to the target's monitor though one was wanted.
    pub(crate) no_monitor: Option<ClientError>,
    _directory: TempDir,
}

impl Embedded {
    /// Adds a virtual machine of this host to a broker of its own, because none listens at
    /// `absent`. Where `asks_vmm`, by its monitor if that can be had.
    pub(crate) fn start(absent: &Path, target: &TargetName, asks_vmm: bool) -> Result<Self> {
        if !rustix::process::geteuid().is_root() {
            bail!(
                "no broker listens at {}, and only root can do without one: start kvmmemd, or run this command as root",
                absent.display()
            );
        }
        let mut ways = vec![which(target)?];
        if asks_vmm {
            ways.extend(by_monitor(&ways));
        }
        let directory = tempfile::Builder::new().prefix("kvmmem-").tempdir();
        let directory = directory.context("cannot make a directory for the broker's socket")?;
        let socket = directory.path().join("broker.sock");
        let server = Server::bind(&socket, None)?;
        server.service().broker().set_brief();
        lock().push(Box::new(server.waits_for_peers()));
        std::thread::Builder::new().name("broker".into()).spawn(move || {
            // Nothing is written to the other end, and it stays open.
            let (stop, _other_end) = UnixStream::pair()?;
            server.run(stop.as_fd()).map_err(io::Error::other)
        })?;
        let mut admin = Admin::connect(&socket)?;
        // The last way is the best one.
        let (mut added, mut no_monitor) = (None, None);
        for which in ways.iter().rev() {
            match (which, admin.add_target(which, None)) {
                (Which::Qmp { pid: Some(_), .. }, Err(error)) => no_monitor = Some(error),
                (_, result) => {
                    added = Some(result);
                    break;
                }
            }
        }
        let added = added
            .context("no way to look at it")?
            .with_context(|| format!("cannot look at {target}"))?;
        let target = added.target.identity.uuid;
        Ok(Self { admin, target, socket, no_monitor, _directory: directory })
    }
}

/// The same virtual machine by its monitor, if its command line names one.
fn by_monitor(ways: &[Which]) -> Option<Which> {
    let [Which::Pid(pid)] = ways else { return None };
    let vm = discover().ok()?.into_iter().find(|vm| vm.pid == *pid)?;
    let socket = vm.qmp.filter(|socket| socket.is_absolute())?;
    Some(Which::Qmp { socket, pid: Some(*pid) })
}

/// How to attach to the virtual machine.
fn which(target: &TargetName) -> Result<Which> {
    Ok(match target {
        TargetName::Name(name) => {
            let found = discover().context("cannot look for virtual machines in /proc")?;
            Which::Pid(named(name, &found)?.pid)
        }
        TargetName::Pid(pid) => Which::Pid(*pid),
        TargetName::Qmp(path) => Which::Qmp {
            socket: std::path::absolute(path).context("cannot find the working directory")?,
            pid: None,
        },
        TargetName::Libvirt(name) => Which::Libvirt(name.clone()),
    })
}

/// The one virtual machine of this name or UUID.
fn named<'a>(name: &str, found: &'a [HostVm]) -> Result<&'a HostVm> {
    let uuid = Uuid::try_parse(name).ok();
    let is_it =
        |vm: &&HostVm| vm.name.as_deref() == Some(name) || uuid.is_some() && vm.uuid == uuid;
    let mut all = found.iter().filter(is_it);
    match (all.next(), all.next()) {
        (Some(vm), None) => Ok(vm),
        (Some(one), Some(other)) => bail!(
            "more than one virtual machine of this host is called {name:?}: --target pid:{} or pid:{}",
            one.pid,
            other.pid
        ),
        (None, _) if Path::new(kvmmem::device::DEFAULT_PATH).exists() => bail!(
            "no virtual machine of this machine is called {name:?}: in an introspector, attach by a token (--token-file)"
        ),
        (None, _) => {
            bail!("no virtual machine of this host is called {name:?}: see kvmmem host discover")
        }
    }
}

#[cfg(test)]
mod tests {
    use kvmmem_qemu::vmm::Vmm;

    use super::*;

    fn found(pid: u32, name: Option<&str>, uuid: u128) -> HostVm {
        HostVm {
            pid,
            vmm: Vmm::Qemu,
            name: name.map(str::to_owned),
            uuid: Some(Uuid::from_u128(uuid)),
            vcpus: None,
            memory_bytes: None,
            machine: None,
            qmp: None,
            attachable: true,
            copied: false,
            reason: None,
            remedy: None,
        }
    }

    #[test]
    fn a_name_or_a_uuid_means_one_virtual_machine() {
        let all = [
            found(7, Some("web"), 1),
            found(8, Some("db"), 2),
            found(9, Some("db"), 3),
            found(10, None, 4),
        ];
        let pid =
            |name: &str| named(name, &all).map(|vm| vm.pid).map_err(|error| error.to_string());
        assert_eq!(pid("web"), Ok(7));
        assert_eq!(pid("00000000-0000-0000-0000-000000000004"), Ok(10));
        assert!(pid("db").unwrap_err().contains("pid:8 or pid:9"));
        assert!(pid("mail").unwrap_err().contains("host discover"));
        assert!(pid("00000000-0000-0000-0000-000000000005").is_err());
    }

    #[test]
    fn a_broker_is_absent_where_nothing_listens_and_else_is_there() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        assert!(is_absent(&Admin::connect(&path).map(drop).unwrap_err()));
        let of = |errno| ClientError::Connect {
            path: path.clone(),
            source: PacketError::Connect(errno),
        };
        // A killed broker leaves its socket.
        assert!(is_absent(&of(Errno::CONNREFUSED)));
        assert!(!is_absent(&of(Errno::ACCESS)) && !is_absent(&of(Errno::AGAIN)));
    }
}
