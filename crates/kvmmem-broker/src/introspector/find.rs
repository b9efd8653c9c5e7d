// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Finds the QEMU that an operator means, and a QMP socket of it that answers.

use std::path::PathBuf;

use kvmmem_proto::message::Which;
use kvmmem_proto::name;
use kvmmem_qemu::attach::{self, AttachError};
use kvmmem_qemu::command_line::Vmm;
use kvmmem_qemu::options::Options;
use kvmmem_qemu::process::{Process, ProcessError};
use kvmmem_qemu::qmp::{Qmp, QmpError};
use kvmmem_qemu::recognise::recognise;
use serde_json::Value;

use super::monitor;

/// The most sockets of one QEMU that are tried.
const MAX_SOCKETS: usize = 8;

/// A QEMU and a connection to it.
#[derive(Debug)]
pub(super) struct Found {
    pub(super) process: Process,
    pub(super) qmp: Qmp,
    /// Which VM it is by its own answer.
    pub(super) identity: Vec<Value>,
}

/// Why there is none.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// The process is not there, or no QEMU.
    #[error(transparent)]
    Attach(#[from] AttachError),
    /// The process runs something else.
    #[error(
        "process {pid} runs {program:?}, which is no QEMU; introspectors of other VMMs have to register themselves"
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

/// Finds a QEMU.
pub(super) fn find(which: &Which) -> Result<Found, FindError> {
    let (process, qmp) = match which {
        Which::Pid(pid) => (open(*pid)?, None),
        Which::Libvirt(name) => (open(attach::libvirts(name)?)?, None),
        Which::Qmp { socket, pid } => {
            let qmp = Qmp::connect(socket).map_err(AttachError::from)?;
            let process = match pid {
                Some(pid) => open(*pid)?,
                None => attach::listener(&qmp)?,
            };
            (process, Some(qmp))
        }
    };
    let (pid, arguments) = (process.pid(), check(&process)?);
    if let Which::Libvirt(name) = which
        && Vmm::Qemu.command_line(&arguments).name != name::fit(name)
    {
        return Err(AttachError::WrongDomain { pid, name: name.clone() }.into());
    }
    let mut qmp = match qmp {
        Some(qmp) => qmp,
        None => first(pid, &sockets(&arguments))?,
    };
    let identity = monitor::identity(&mut qmp).map_err(FindError::Identity)?;
    // QEMU may have taken its time to answer, and the process may be another program's or another
    // one's by now.
    check(&process)?;
    // What was read of the process until now was its own.
    if !process.is_alive() {
        return Err(AttachError::Ended(pid).into());
    }
    Ok(Found { process, qmp, identity })
}

/// Whether a process runs QEMU; returns its arguments.
fn check(process: &Process) -> Result<Vec<String>, FindError> {
    let arguments = process.arguments().map_err(AttachError::from)?;
    let (pid, program) = (process.pid(), process.program().map_err(AttachError::from)?);
    match recognise(process, &program, &arguments).map_err(AttachError::from)? {
        Some(Vmm::Qemu) => Ok(arguments),
        _ => Err(FindError::NoQemu { pid, program }),
    }
}

fn open(pid: u32) -> Result<Process, AttachError> {
    Process::open(pid).map_err(|error: ProcessError| error.into())
}

/// The first socket at which this very process answers.
fn first(pid: u32, sockets: &[PathBuf]) -> Result<Qmp, FindError> {
    let mut failure = None;
    for socket in sockets {
        match Qmp::connect(socket) {
            Ok(qmp) if qmp.listener() == Some(pid) => return Ok(qmp),
            // Somebody else's, or handed to it: whoever did that is connected.
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
}
