// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A process of this host, looked at through `/proc`. Nothing in there is to be believed but what
//! the kernel writes by itself: the command line is the process's to change.

use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::mapping::{self, Mapping};

/// The longest command line that is read, bytes.
const MAX_ARGUMENTS: u64 = 256 * 1024;

/// The longest list of mappings that is read, bytes.
const MAX_MAPS: u64 = 16 * 1024 * 1024;

/// The most file descriptors that are looked through.
const MAX_FILES: usize = 65_536;

/// A process. Whoever gets its number later is another one, and is not taken for it.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    /// `/proc/PID`, which the kernel ties to the process and not to the number.
    directory: OwnedFd,
    pidfd: OwnedFd,
}

/// Which file: its device and its inode.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FileId {
    pub(crate) device: u64,
    pub(crate) inode: u64,
}

/// Why a process cannot be looked at.
#[derive(Debug, thiserror::Error)]
pub enum ProcessError {
    /// It is not there, or has ended.
    #[error("there is no process {0}")]
    Gone(u32),
    /// It may not be looked at.
    #[error("process {0} may not be looked at; root with CAP_SYS_PTRACE may")]
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

impl FileId {
    /// Of an open file.
    pub fn of(stat: &Stat) -> Self {
        Self { device: stat.st_dev, inode: stat.st_ino }
    }

    /// The same of a file descriptor; `None` where the kernel does not say.
    pub fn of_file(file: impl AsFd) -> Option<Self> {
        rustix::fs::fstat(file).ok().map(|stat| Self::of(&stat))
    }
}

impl Process {
    /// The process with a number.
    ///
    /// # Errors
    /// [`ProcessError`].
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
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn uid(&self) -> Result<u32, ProcessError> {
        let stat = rustix::fs::fstat(&self.directory);
        stat.map(|stat| stat.st_uid).map_err(|error| failed(self.pid, "the user", error.into()))
    }

    /// File name of the program that it runs, also where that file was deleted.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn program(&self) -> Result<String, ProcessError> {
        let link = rustix::fs::readlinkat(&self.directory, "exe", Vec::new())
            .map_err(|error| failed(self.pid, "the program", error.into()))?;
        let path = String::from_utf8_lossy(link.as_bytes());
        let path = path.strip_suffix(" (deleted)").unwrap_or(&path);
        Ok(path.rsplit('/').next().unwrap_or_default().to_owned())
    }

    /// Whether its program runs with other rights than the user has who started it (set-user-ID,
    /// set-group-ID).
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn is_set_id(&self) -> Result<bool, ProcessError> {
        let stat = rustix::fs::statat(&self.directory, "exe", AtFlags::empty());
        let stat = stat.map_err(|error| failed(self.pid, "the program", error.into()))?;
        Ok(Mode::from_raw_mode(stat.st_mode).intersects(Mode::SUID | Mode::SGID))
    }

    /// The arguments, the program's name first. Bytes that are no UTF-8 are replaced.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn arguments(&self) -> Result<Vec<String>, ProcessError> {
        let bytes = self.read("cmdline", "the command line", MAX_ARGUMENTS)?;
        let bytes = bytes.strip_suffix(b"\0").unwrap_or(&bytes);
        Ok(bytes
            .split(|byte| *byte == 0)
            .map(|word| String::from_utf8_lossy(word).into_owned())
            .collect())
    }

    /// When it was started, clock ticks since the host was; `None` where the kernel does not say.
    /// No two processes have this and the number in common.
    pub fn started(&self) -> Option<u64> {
        let stat = self.read("stat", "the state", 4096).ok()?;
        let stat = String::from_utf8_lossy(&stat).into_owned();
        // The name before the last parenthesis is the process's own choice; the start time is the
        // 20th word behind it.
        stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
    }

    /// What sets this process apart from all others of this host, also of other boots: a digest of
    /// the boot's id, its number and its start. `None` where the kernel does not say.
    pub fn identity(&self) -> Option<[u8; 32]> {
        let boot = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let identity = format!("kvmmem process {} {} {}", boot.trim(), self.pid, self.started()?);
        Some(Sha256::digest(identity).into())
    }

    /// When it was started, milliseconds since the epoch; `None` where the kernel does not say.
    pub fn start_time_ms(&self) -> Option<i64> {
        let ticks = i64::try_from(self.started()?).ok()?;
        let per_second = i64::try_from(rustix::param::clock_ticks_per_second()).ok()?;
        let boot = std::fs::read_to_string("/proc/stat").ok()?;
        let boot: i64 =
            boot.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
        boot.checked_mul(1000)?.checked_add(ticks.checked_mul(1000)?.checked_div(per_second)?)
    }

    /// What it has mapped and may write.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn mappings(&self) -> Result<Vec<Mapping>, ProcessError> {
        let text = self.read("maps", "the mappings", MAX_MAPS)?;
        Ok(mapping::parse(&String::from_utf8_lossy(&text)))
    }

    /// A path of a file that is absolute for it, whatever its root directory. As long as this
    /// lasts.
    pub fn path_of(&self, path: &Path) -> PathBuf {
        let root = format!("/proc/self/fd/{}/root", self.directory.as_raw_fd());
        Path::new(&root).join(path.strip_prefix("/").unwrap_or(path))
    }

    /// Its memory, by its own addresses, for reading and writing. It stays that of the program that
    /// runs now.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn memory(&self) -> Result<OwnedFd, ProcessError> {
        let flags = OFlags::RDWR | OFlags::CLOEXEC;
        rustix::fs::openat(&self.directory, "mem", flags, Mode::empty())
            .map_err(|error| failed(self.pid, "the memory", error.into()))
    }

    /// What a file descriptor whose link the check accepts is linked to.
    ///
    /// # Errors
    /// [`ProcessError`].
    pub fn find_link(
        &self,
        accepts: impl Fn(&str) -> bool,
    ) -> Result<Option<String>, ProcessError> {
        self.find_file(|directory, name| {
            let link = rustix::fs::readlinkat(directory, name, Vec::new()).ok()?;
            let link = String::from_utf8_lossy(link.as_bytes()).into_owned();
            accepts(&link).then_some(link)
        })
    }

    /// Opens a file that it has open, for reading and writing.
    ///
    /// # Errors
    /// [`ProcessError`]; `Ok(None)` where it does not have that file open.
    pub fn open_file(&self, id: FileId) -> Result<Option<OwnedFd>, ProcessError> {
        self.find_file(|directory, name| {
            let is_it = |stat: &Stat| {
                FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile
                    && FileId::of(stat) == id
            };
            rustix::fs::statat(directory, name, AtFlags::empty()).ok().filter(is_it)?;
            // It may be another file by now, even a pipe that would be waited for.
            let flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
            let file = rustix::fs::openat(directory, name, flags, Mode::empty()).ok()?;
            rustix::fs::fstat(&file).ok().filter(is_it)?;
            Some(file)
        })
    }

    fn find_file<T>(
        &self,
        mut find: impl FnMut(BorrowedFd<'_>, &std::ffi::CStr) -> Option<T>,
    ) -> Result<Option<T>, ProcessError> {
        let fail = |source: Errno| failed(self.pid, "the open files", source.into());
        let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
        let directory =
            rustix::fs::openat(&self.directory, "fd", flags, Mode::empty()).map_err(fail)?;
        for entry in Dir::read_from(&directory).map_err(fail)?.take(MAX_FILES) {
            if let Some(found) = find(directory.as_fd(), entry.map_err(fail)?.file_name()) {
                return Ok(Some(found));
            }
        }
        Ok(None)
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
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen() {
        let process = Process::open(std::process::id()).unwrap();
        assert!(process.is_alive());
        assert_eq!(process.uid().unwrap(), rustix::process::geteuid().as_raw());
        let program = std::env::current_exe().unwrap();
        assert_eq!(process.program().unwrap(), program.file_name().unwrap().to_string_lossy());
        let arguments: Vec<String> = std::env::args().collect();
        assert_eq!(process.arguments().unwrap(), arguments);
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        let age = i64::try_from(now.as_millis()).unwrap() - process.start_time_ms().unwrap();
        assert!((-2000..86_400_000).contains(&age), "{age}");
        assert!(!process.mappings().unwrap().is_empty());
    }

    #[test]
    fn an_identity_is_one_process_s() {
        let of = |pid| Process::open(pid).unwrap().identity().unwrap();
        let this = of(std::process::id());
        assert_eq!(this, of(std::process::id()));
        assert_ne!(this, of(1));
    }

    #[test]
    fn an_open_file_is_found_by_its_identity_alone() {
        let file = tempfile::tempfile().unwrap();
        let id = FileId::of(&rustix::fs::fstat(&file).unwrap());
        let process = Process::open(std::process::id()).unwrap();
        let opened = process.open_file(id).unwrap().unwrap();
        assert_eq!(FileId::of(&rustix::fs::fstat(&opened).unwrap()), id);
        assert!(
            process.open_file(FileId { device: id.device, inode: u64::MAX }).unwrap().is_none()
        );
    }

    #[test]
    fn who_is_not_there_is_gone() {
        for pid in [0, u32::MAX, i32::MAX as u32] {
            assert!(matches!(Process::open(pid), Err(ProcessError::Gone(_))));
        }
        let mut child = std::process::Command::new("true").spawn().unwrap();
        let process = Process::open(child.id()).unwrap();
        child.wait().unwrap();
        assert!(!process.is_alive());
        assert!(matches!(process.arguments(), Err(ProcessError::Gone(_))));
    }
}
