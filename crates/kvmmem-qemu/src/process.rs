// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A process of this host, looked at through `/proc`. Nothing in there is to be believed but what
//! the kernel writes by itself: the command line is the process's to change.

mod files;
mod identity;

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::mapping::{self, Mapping};

/// The longest command line that is read, bytes.
const MAX_ARGUMENTS: u64 = 256 * 1024;

/// The longest list of mappings that is read, bytes.
const MAX_MAPS: u64 = 16 * 1024 * 1024;

/// A process. A later one with its number is not taken for it.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    /// `/proc/PID`, which the kernel ties to the process and not to the number.
    directory: OwnedFd,
    pidfd: OwnedFd,
}

/// Why a process cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It is not there, or has ended.
    #[error("there is no process {0}")]
    Gone(u32),
    /// It may not be examined.
    #[error("process {0} may not be examined; root with CAP_SYS_PTRACE may")]
    Denied(u32),
    /// What `/proc` says is longer than it is with any VMM.
    #[error("{what} of process {pid} is too long to be a VMM's")]
    TooLong {
        /// The process.
        pid: u32,
        /// What is too long.
        what: &'static str,
    },
    /// Looking failed.
    #[error("cannot read {what} of process {pid}")]
    Read {
        /// The process.
        pid: u32,
        /// What was read.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl Process {
    /// The process with a number.
    pub fn open(pid: u32) -> Result<Self, ProcessError> {
        let number =
            i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(ProcessError::Gone(pid))?;
        let fail = |source: Errno| failed(pid, "the directory", source.into());
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let directory =
            rustix::fs::open(format!("/proc/{pid}"), flags, Mode::empty()).map_err(fail)?;
        let pidfd = rustix::process::pidfd_open(number, PidfdFlags::empty()).map_err(fail)?;
        let process = Self { pid, directory, pidfd };
        // If this can still be read by the directory, then the pidfd, which is younger, is the same
        // process's.
        process.read("stat", "the state", 4096)?;
        Ok(process)
    }

    /// Its number.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Becomes readable when the process ends.
    pub fn into_pidfd(self) -> OwnedFd {
        self.pidfd
    }

    /// The same, while this lasts.
    pub fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Ends it at once.
    ///
    /// # Errors
    /// Where this process may not.
    pub fn kill(&self) -> Result<(), Errno> {
        match rustix::process::pidfd_send_signal(&self.pidfd, Signal::KILL) {
            Ok(()) | Err(Errno::SRCH) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Whether it is still there. What was read of it before this was true belongs to it.
    pub fn is_alive(&self) -> bool {
        let now = Timespec::try_from(Duration::ZERO).ok();
        let mut fds = [PollFd::new(&self.pidfd, PollFlags::IN)];
        matches!(rustix::event::poll(&mut fds, now.as_ref()), Ok(0))
    }

    /// The user that it runs as.
    pub fn uid(&self) -> Result<u32, ProcessError> {
        let stat = rustix::fs::fstat(&self.directory);
        stat.map(|stat| stat.st_uid).map_err(|error| failed(self.pid, "the user", error.into()))
    }

    /// File name of the program that it runs, also where that file was deleted.
    pub fn program(&self) -> Result<String, ProcessError> {
        let link = rustix::fs::readlinkat(&self.directory, "exe", Vec::new())
            .map_err(|error| failed(self.pid, "the program", error.into()))?;
        let path = String::from_utf8_lossy(link.as_bytes());
        let path = path.strip_suffix(" (deleted)").unwrap_or(&path);
        Ok(path.rsplit('/').next().unwrap_or_default().to_owned())
    }

    /// Whether its program runs with other rights than the user has who started it (set-user-ID,
    /// set-group-ID).
    pub fn is_set_id(&self) -> Result<bool, ProcessError> {
        let stat = rustix::fs::statat(&self.directory, "exe", AtFlags::empty());
        let stat = stat.map_err(|error| failed(self.pid, "the program", error.into()))?;
        Ok(Mode::from_raw_mode(stat.st_mode).intersects(Mode::SUID | Mode::SGID))
    }

    /// The arguments, the program's name first. Bytes that are no UTF-8 are replaced.
    pub fn arguments(&self) -> Result<Vec<String>, ProcessError> {
        let bytes = self.read("cmdline", "the command line", MAX_ARGUMENTS)?;
        let bytes = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
        Ok(bytes
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect())
    }

    /// What it has mapped and may write.
    pub fn mappings(&self) -> Result<Vec<Mapping>, ProcessError> {
        let text = self.read("maps", "the mappings", MAX_MAPS)?;
        Ok(mapping::parse(&String::from_utf8_lossy(&text)))
    }

    /// The file that the process has at an absolute path, in its own root directory. Valid as long
    /// as this lives.
    pub fn path_of(&self, path: &Path) -> PathBuf {
        let root = format!("/proc/self/fd/{}/root", self.directory.as_raw_fd());
        Path::new(&root).join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Its memory, by its own addresses, for reading and writing. It stays that of the program that
    /// runs now.
    pub fn memory(&self) -> Result<OwnedFd, ProcessError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::openat(&self.directory, "mem", flags, Mode::empty())
            .map_err(|error| failed(self.pid, "the memory", error.into()))
    }

    fn read(&self, name: &str, what: &'static str, limit: u64) -> Result<Vec<u8>, ProcessError> {
        let fail = |source: io::Error| failed(self.pid, what, source);
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, name, flags, Mode::empty());
        let file = std::fs::File::from(file.map_err(|error| fail(error.into()))?);
        let mut bytes = Vec::new();
        file.take(limit + 1).read_to_end(&mut bytes).map_err(fail)?;
        if bytes.len() as u64 > limit {
            return Err(ProcessError::TooLong { pid: self.pid, what });
        }
        Ok(bytes)
    }
}

fn failed(pid: u32, what: &'static str, source: io::Error) -> ProcessError {
    match source.raw_os_error().map(Errno::from_raw_os_error) {
        Some(Errno::NOENT | Errno::SRCH) => ProcessError::Gone(pid),
        Some(Errno::ACCESS | Errno::PERM) => ProcessError::Denied(pid),
        _ => ProcessError::Read { pid, what, source },
    }
}

#[cfg(test)]
mod tests;
