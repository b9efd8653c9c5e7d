// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds the process and the QMP connection that an operator means.

use std::path::{Path, PathBuf};

use kvmmem_proto::message::Which;
use kvmmem_proto::name;
use serde_json::{Value, json};

use super::command_line::CommandLine;
use super::options::Options;
use super::process::{Process, ProcessError};
use super::recognise::recognise;
use super::vmm::Vmm;
use crate::qmp::{Qmp, QmpError};

/// Where libvirt's system daemon keeps the process ids of its VMs.
const LIBVIRT: &str = "/run/libvirt/qemu";

/// The most sockets of one QEMU that are tried.
const MAX_SOCKETS: usize = 8;

/// What a QEMU says of itself, and says again over a later connection.
const IDENTITY: [&str; 2] = ["query-name", "query-uuid"];

/// Connects to a QMP socket, or borrows the connection that there is already.
pub type Connect<'a> = &'a dyn Fn(&Path) -> Result<Qmp, QmpError>;

/// A QEMU and a connection to it.
#[derive(Debug)]
pub struct Qemu {
    /// Its process.
    pub process: Process,
    /// A connection to it.
    pub qmp: Qmp,
    /// Which VM it is by its own answer.
    pub identity: Vec<Value>,
}

/// Why a process or its QMP connection is not found.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// libvirt has no such VM, or it does not run.
    #[error("libvirt runs no VM named {name:?} ({path} has no process id)")]
    NoDomain {
        /// The name.
        name: String,
        /// Where its process id would be.
        path: PathBuf,
    },
    /// The process that libvirt named runs something else.
    #[error("process {pid} does not run libvirt's VM {name:?}")]
    WrongDomain {
        /// The process.
        pid: u32,
        /// The name.
        name: String,
    },
    /// Another process than QEMU listens at the QMP socket.
    #[error(
        "process {pid} listens at the QMP socket and runs {program:?}; give QEMU's process id too"
    )]
    HandedSocket {
        /// The process.
        pid: u32,
        /// File name of its program.
        program: String,
    },
    /// It is not known who listens at the QMP socket.
    #[error("it is not known which process listens at the QMP socket; give QEMU's process id too")]
    NoListener,
    /// The process ended while it was looked at.
    #[error("process {0} has ended")]
    Ended(u32),
    /// The process cannot be looked at.
    #[error(transparent)]
    Process(#[from] ProcessError),
    /// QEMU does not answer.
    #[error(transparent)]
    Qmp(#[from] QmpError),
    /// The process runs something else.
    #[error(
        "process {pid} runs {program:?}, which is not QEMU; introspectors of other VMMs have to register themselves"
    )]
    NoQemu {
        /// The process.
        pid: u32,
        /// File name of its program.
        program: String,
    },
    /// Its command line names no QMP socket.
    #[error(
        "process {0} has no QMP socket of its own that is known; start it with -qmp unix:PATH,server=on,wait=off, or give the socket"
    )]
    NoSocket(u32),
    /// It does not say which VM it is.
    #[error("QEMU does not say which VM it runs")]
    Identity(#[source] QmpError),
    /// None of its sockets answers.
    #[error("no QMP socket of process {pid} answers; give QEMU one more, for the broker alone")]
    Silent {
        /// The process.
        pid: u32,
        /// Why the last one that was tried does not.
        #[source]
        source: QmpError,
    },
}

/// The process that is meant, and the QMP connection where that was given.
pub(crate) fn process(
    which: &Which,
    connect: Connect<'_>,
) -> Result<(Process, Option<Qmp>), FindError> {
    Ok(match which {
        Which::Pid(pid) => (Process::open(*pid)?, None),
        Which::Libvirt(domain) => (Process::open(libvirts(domain)?)?, None),
        Which::Qmp { socket, pid } => {
            let qmp = connect(socket)?;
            let process = match pid {
                Some(pid) => Process::open(*pid)?,
                None => listener(&qmp)?,
            };
            (process, Some(qmp))
        }
    })
}

/// Finds a QEMU, and a QMP socket of it that answers.
pub fn find(which: &Which, connect: Connect<'_>) -> Result<Qemu, FindError> {
    let (process, qmp) = process(which, connect)?;
    let (pid, arguments) = (process.pid(), check(&process)?);
    check_name(which, pid, CommandLine::parse(Vmm::Qemu, &arguments).name)?;
    let mut qmp = match qmp {
        Some(qmp) => qmp,
        None => first(pid, &sockets(&arguments), connect)?,
    };
    let identity = identity(&mut qmp).map_err(FindError::Identity)?;
    // QEMU may have taken its time to answer, and the process may be another program's or another
    // one's by now.
    check(&process)?;
    // What was read of the process until now was its own.
    if !process.is_alive() {
        return Err(FindError::Ended(pid));
    }
    Ok(Qemu { process, qmp, identity })
}

/// Whether the process that libvirt named has the VM's name on its command line.
pub(crate) fn check_name(which: &Which, pid: u32, found: Option<String>) -> Result<(), FindError> {
    match which {
        Which::Libvirt(domain) if found != name::fit(domain) => {
            Err(FindError::WrongDomain { pid, name: domain.clone() })
        }
        _ => Ok(()),
    }
}

/// Which QEMU it is, by its own answer: the wrapper that made its socket may have made others for
/// other QEMUs.
pub fn identity(qmp: &mut Qmp) -> Result<Vec<Value>, QmpError> {
    IDENTITY.iter().map(|command| qmp.execute(command, json!({}))).collect()
}

/// Whether a process runs QEMU; returns its arguments.
fn check(process: &Process) -> Result<Vec<String>, FindError> {
    let arguments = process.arguments()?;
    let (pid, program) = (process.pid(), process.program()?);
    match recognise(process, &program, &arguments)? {
        Some(Vmm::Qemu) => Ok(arguments),
        _ => Err(FindError::NoQemu { pid, program }),
    }
}

/// The first socket at which this very process answers.
fn first(pid: u32, sockets: &[PathBuf], connect: Connect<'_>) -> Result<Qmp, FindError> {
    let mut failure = None;
    for socket in sockets {
        match connect(socket) {
            Ok(qmp) if qmp.listener() == Some(pid) => return Ok(qmp),
            // Another process's, or handed to it: then the process that did so is connected.
            Ok(_) => {}
            Err(error) => failure = Some(error),
        }
    }
    Err(match failure {
        Some(source) => FindError::Silent { pid, source },
        None => FindError::NoSocket(pid),
    })
}

/// The QMP sockets that QEMU's command line names.
fn sockets(arguments: &[String]) -> Vec<PathBuf> {
    let options = |name: &'static str| {
        let pairs = arguments.iter().zip(arguments.iter().skip(1));
        let is_it = move |key: &str| {
            key.strip_prefix('-').is_some_and(|key| key.trim_start_matches('-') == name)
        };
        pairs.filter(move |(key, _)| is_it(key)).map(|(_, value)| value.as_str())
    };
    let plain = options("qmp").chain(options("qmp-pretty")).filter_map(|value| {
        Some(Options::parse(value.strip_prefix("unix:")?, "path").get("path")?.to_owned())
    });
    let monitors = options("mon").filter_map(|value| {
        let monitor = Options::parse(value, "chardev");
        monitor.get("mode").filter(|mode| *mode == "control")?;
        let id = monitor.get("chardev")?.to_owned();
        options("chardev")
            .map(|value| Options::parse(value, "backend"))
            .find(|chardev| chardev.get("id") == Some(&id))?
            .get("path")
            .map(str::to_owned)
    });
    plain
        .chain(monitors)
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .take(MAX_SOCKETS)
        .collect()
}

/// The QEMU that listens at its own QMP socket.
fn listener(qmp: &Qmp) -> Result<Process, FindError> {
    let process = Process::open(qmp.listener().ok_or(FindError::NoListener)?)?;
    let (pid, program) = (process.pid(), process.program()?);
    match recognise(&process, &program, &process.arguments()?)? {
        Some(_) => Ok(process),
        None => Err(FindError::HandedSocket { pid, program }),
    }
}

/// The process that runs a VM of libvirt's, be it the system's or one of a session of this
/// process's user.
///
/// # Errors
/// [`FindError::NoDomain`].
pub fn libvirts(name: &str) -> Result<u32, FindError> {
    let session = format!("/run/user/{}/libvirt/qemu/run", rustix::process::geteuid().as_raw());
    let of_session = |error| libvirt_pid(Path::new(&session), name).map_err(|_| error);
    libvirt_pid(Path::new(LIBVIRT), name).or_else(of_session)
}

/// The process whose number is in a directory of libvirt's.
fn libvirt_pid(directory: &Path, name: &str) -> Result<u32, FindError> {
    let path = directory.join(format!("{}.pid", name.replace('/', "_")));
    let text = std::fs::read_to_string(&path).ok();
    let pid = text.and_then(|text| text.trim().parse().ok());
    pid.ok_or_else(|| FindError::NoDomain { name: name.to_owned(), path })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_qmp_sockets_of_a_command_line_are_found() {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let found = sockets(&words(
            "qemu-system-x86_64 -qmp unix:/run/a,server=on,wait=off -qmp tcp:localhost:1 \
             -chardev socket,id=c,path=/run/b,server=on -mon chardev=c,mode=control \
             -chardev socket,id=d,path=/run/human -mon chardev=d,mode=readline \
             -chardev socket,id=charmonitor,fd=32,server=on -mon chardev=charmonitor,mode=control \
             --qmp-pretty unix:/run/c -qmp unix:relative -qmp",
        ));
        assert_eq!(found, ["/run/a", "/run/c", "/run/b"].map(PathBuf::from));
    }

    #[test]
    fn libvirts_process_ids_are_read_from_its_directory_alone() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("qemu");
        std::fs::create_dir(&inner).unwrap();
        std::fs::write(inner.join("web1.pid"), "4711\n").unwrap();
        std::fs::write(inner.join("bad.pid"), "-1").unwrap();
        std::fs::write(directory.path().join("outside.pid"), "4711").unwrap();
        assert_eq!(libvirt_pid(&inner, "web1").unwrap(), 4711);
        for name in ["bad", "none", "", "../outside", "/web1"] {
            let error = libvirt_pid(&inner, name).unwrap_err();
            assert!(matches!(error, FindError::NoDomain { .. }), "{name}: {error}");
        }
    }
}
