// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A running program whose output goes out as frames.
//!
//! A program is launched in a process group of its own. It is reaped last, when its client has
//! gone: until then its id, which is the group's, cannot be another's, so that what it started can
//! be killed after it has ended.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::process::{
    Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid,
};

use crate::channel::send;
use crate::frame::Kind;
use crate::request::{Command, ExitStatus};
use crate::{frame, launch};

/// Frames of stdin that may wait for the program to read them.
const STDIN_QUEUE: usize = 64;

/// How long killed processes may take to end.
const KILLED: Duration = Duration::from_secs(30);

/// A program started by [`start`].
#[derive(Debug)]
pub struct ChildProcess {
    pid: Pid,
    handle: Handle,
    /// Readable once the program has ended.
    ended: Arc<OwnedFd>,
    pumps: Receiver<()>,
    pump_count: usize,
}

/// Reaches a program from other threads.
#[derive(Clone, Debug)]
pub struct Handle {
    // `None` as soon as the program has been reaped, so that no signal can hit a later process of
    // the same id.
    child: Arc<Mutex<Option<(Pid, Child)>>>,
    stdin: SyncSender<Vec<u8>>,
}

/// Starts `command`; its output goes to `sink` as `Stdout` and `Stderr` frames.
///
/// # Errors
/// When no process can be made. A program that cannot be run is not an error here: it ends with
/// code 127.
pub fn start(command: &Command, sink: &Arc<Mutex<File>>) -> io::Result<ChildProcess> {
    let ended = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
    let mut child = launch::launcher(command)?
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()?;
    let (stdin, input) = mpsc::sync_channel(STDIN_QUEUE);
    if let Some(pipe) = child.stdin.take() {
        thread::spawn(move || feed(pipe, &input));
    }
    let (done, pumps) = mpsc::channel();
    let mut pump_count = 0;
    if let Some(pipe) = child.stdout.take() {
        pump_count += 1;
        pump(pipe, Kind::Stdout, sink, &ended, done.clone());
    }
    if let Some(pipe) = child.stderr.take() {
        pump_count += 1;
        pump(pipe, Kind::Stderr, sink, &ended, done.clone());
    }
    let pid = Pid::from_child(&child);
    let handle = Handle { child: Arc::new(Mutex::new(Some((pid, child)))), stdin };
    Ok(ChildProcess { pid, handle, ended, pumps, pump_count })
}

impl ChildProcess {
    /// To signal it and to feed its stdin.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits until it has ended and its output has been sent. It is not reaped: see
    /// [`Handle::reap`].
    ///
    /// # Errors
    /// When the system does not report its exit status.
    pub fn wait(self) -> io::Result<ExitStatus> {
        let status = loop {
            match waitid(WaitId::Pid(self.pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT) {
                Ok(Some(status)) => break status,
                Ok(None) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        };
        // It fails only where the counter is full.
        let _ = rustix::io::write(&self.ended, &1u64.to_ne_bytes());
        for _ in 0..self.pump_count {
            // It fails only where all pumps have ended.
            let _ = self.pumps.recv();
        }
        let signal = status.terminating_signal().map(ExitStatus::Signal);
        Ok(signal.unwrap_or_else(|| ExitStatus::Code(status.exit_status().unwrap_or(-1))))
    }
}

impl Handle {
    /// Sends a signal to the program itself; nothing happens if it has ended.
    ///
    /// # Errors
    /// When there is no such signal.
    pub fn signal(&self, number: i32) -> io::Result<()> {
        let signal = Signal::from_named_raw(number).ok_or(io::ErrorKind::InvalidInput)?;
        match &*self.lock() {
            Some((pid, _)) => Ok(kill_process(*pid, signal)?),
            None => Ok(()),
        }
    }

    /// Kills the program and what it started, and waits until none of them holds a file or memory
    /// any more.
    ///
    /// # Errors
    /// When some of them do not end.
    pub fn kill_all(&self) -> io::Result<()> {
        let Some(pid) = self.lock().as_ref().map(|(pid, _)| *pid) else { return Ok(()) };
        let deadline = Instant::now() + KILLED;
        loop {
            // Each time anew: the launcher may not have made its session yet, and one of them may
            // have forked.
            let _ = kill_process(pid, Signal::KILL);
            let _ = kill_process_group(pid, Signal::KILL);
            if !is_alive(pid)? {
                return Ok(());
            }
            if Instant::now() >= deadline {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "killed processes do not end"));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Reaps the program, which has ended. Its id may be another's from now on.
    ///
    /// # Errors
    /// As `waitpid(2)`'s.
    pub fn reap(&self) -> io::Result<()> {
        let child = self.lock().take();
        child.map_or(Ok(()), |(_, mut child)| child.wait().map(drop))
    }

    /// Queues bytes for its stdin; none close it.
    ///
    /// # Errors
    /// When the program does not read and the queue is full.
    pub fn feed(&self, bytes: Vec<u8>) -> io::Result<()> {
        match self.stdin.try_send(bytes) {
            Err(mpsc::TrySendError::Full(_)) => {
                Err(io::Error::new(io::ErrorKind::OutOfMemory, "stdin is full"))
            }
            // The pipe is closed: as with a shell's pipe, what is written to it is lost.
            Ok(()) | Err(mpsc::TrySendError::Disconnected(_)) => Ok(()),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<(Pid, Child)>> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether the process or one of its group is more than a zombie, which holds nothing any more.
fn is_alive(leader: Pid) -> io::Result<bool> {
    let id = leader.to_string();
    for entry in fs::read_dir("/proc")? {
        let entry = entry?;
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else { continue };
        // proc_pid_stat(5): the name is in parentheses and may hold anything; then state, parent,
        // group.
        let mut fields =
            stat.rsplit_once(')').map_or("", |(_, rest)| rest).split_ascii_whitespace();
        let (state, _, group) = (fields.next(), fields.next(), fields.next());
        let is_of_it =
            group == Some(id.as_str()) || entry.file_name().to_str() == Some(id.as_str());
        if is_of_it && !matches!(state, Some("Z" | "X")) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn feed(mut pipe: ChildStdin, input: &Receiver<Vec<u8>>) {
    for bytes in input {
        if bytes.is_empty() || pipe.write_all(&bytes).is_err() {
            return;
        }
    }
}

/// Sends what comes out of a pipe. Reports once that all that the program has written is sent; a
/// child of it may hold the pipe open and write more.
fn pump(
    mut pipe: impl Read + AsFd + Send + 'static,
    kind: Kind,
    sink: &Arc<Mutex<File>>,
    ended: &Arc<OwnedFd>,
    done: Sender<()>,
) {
    let (sink, ended) = (Arc::clone(sink), Arc::clone(ended));
    thread::spawn(move || {
        let mut bytes = vec![0; frame::MAX_PAYLOAD];
        let mut done = Some(done);
        // How much of it is in the pipe, once the program has ended.
        let mut left: Option<usize> = None;
        loop {
            if left.is_none() && wait_readable(&pipe, &ended) {
                let size = rustix::io::ioctl_fionread(&pipe).unwrap_or(0);
                left = usize::try_from(size).ok();
            }
            if left == Some(0)
                && let Some(done) = done.take()
            {
                // The waiter may have given up already.
                let _ = done.send(());
            }
            let read = match pipe.read(&mut bytes) {
                Ok(0) => break,
                Ok(length) => bytes.get(..length).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            if send(&sink, kind, read).is_err() {
                break;
            }
            left = left.map(|left| left.saturating_sub(read.len()));
        }
        if let Some(done) = done {
            let _ = done.send(());
        }
    });
}

/// Waits until there is something to read, or the program has ended; whether it has.
fn wait_readable(pipe: &impl AsFd, ended: &OwnedFd) -> bool {
    let mut fds = [PollFd::new(pipe, PollFlags::IN), PollFd::new(ended, PollFlags::IN)];
    while poll(&mut fds, None) == Err(rustix::io::Errno::INTR) {}
    let [_, ended] = &fds;
    !ended.revents().is_empty()
}
