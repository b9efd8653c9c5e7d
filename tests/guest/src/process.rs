// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A running program whose output goes out as frames.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender, SyncSender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, kill_process_group, waitid};

use crate::channel::send;
use crate::frame::Kind;
use crate::request::{Command, ExitStatus};
use crate::{frame, launch};

/// How long output may still come after the program has ended: a child of it may hold the pipes open.
const LINGER: Duration = Duration::from_millis(500);

/// Frames of stdin that may wait for the program to read them.
const STDIN_QUEUE: usize = 64;

/// A program started by [`start`].
#[derive(Debug)]
pub struct Running {
    child: Child,
    handle: Handle,
    pumps: Receiver<()>,
    pump_count: usize,
}

/// Reaches a program from other threads.
#[derive(Clone, Debug)]
pub struct Handle {
    // `None` as soon as the program has been reaped, so that no signal can hit a later process of the same id.
    pid: Arc<Mutex<Option<Pid>>>,
    stdin: SyncSender<Vec<u8>>,
}

/// Starts `command`; its output goes to `sink` as `Stdout` and `Stderr` frames.
///
/// # Errors
/// When no process can be made. A program that cannot be run is no error here: it ends with code 127.
pub fn start(command: &Command, sink: &Arc<Mutex<File>>) -> io::Result<Running> {
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
        pump(pipe, Kind::Stdout, sink, &done);
    }
    if let Some(pipe) = child.stderr.take() {
        pump_count += 1;
        pump(pipe, Kind::Stderr, sink, &done);
    }
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
    let handle = Handle { pid: Arc::new(Mutex::new(pid)), stdin };
    Ok(Running { child, handle, pumps, pump_count })
}

impl Running {
    /// To signal it and to feed its stdin.
    #[must_use]
    pub fn handle(&self) -> Handle {
        self.handle.clone()
    }

    /// Waits until it has ended and its output has been sent.
    ///
    /// # Errors
    /// When the system cannot say how it ended.
    pub fn wait(mut self) -> io::Result<ExitStatus> {
        let pid = *self.handle.lock();
        if let Some(pid) = pid {
            // Not reaped yet: the id stays ours until the handle has forgotten it.
            while let Err(error) =
                waitid(WaitId::Pid(pid), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT).map(drop)
            {
                if error != rustix::io::Errno::INTR {
                    return Err(error.into());
                }
            }
        }
        let status = {
            let mut pid = self.handle.lock();
            *pid = None;
            self.child.wait()?
        };
        let deadline = Instant::now() + LINGER;
        for _ in 0..self.pump_count {
            let left = deadline.saturating_duration_since(Instant::now());
            if self.pumps.recv_timeout(left) == Err(RecvTimeoutError::Timeout) {
                break;
            }
        }
        Ok(status.signal().map_or_else(|| ExitStatus::Code(status.code().unwrap_or(-1)), ExitStatus::Signal))
    }
}

impl Handle {
    /// Sends a signal to the program itself; nothing happens if it has ended.
    ///
    /// # Errors
    /// When there is no such signal.
    pub fn signal(&self, number: i32) -> io::Result<()> {
        let signal = Signal::from_named_raw(number).ok_or(io::ErrorKind::InvalidInput)?;
        match *self.lock() {
            Some(pid) => Ok(kill_process(pid, signal)?),
            None => Ok(()),
        }
    }

    /// Kills the program and what it started, unless it has ended.
    pub fn kill_all(&self) {
        if let Some(pid) = *self.lock() {
            // The launcher may not have made its session yet, so the process itself is killed as well.
            let _ = kill_process_group(pid, Signal::KILL);
            let _ = kill_process(pid, Signal::KILL);
        }
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

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Pid>> {
        self.pid.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn feed(mut pipe: ChildStdin, input: &Receiver<Vec<u8>>) {
    for bytes in input {
        if bytes.is_empty() || pipe.write_all(&bytes).is_err() {
            return;
        }
    }
}

fn pump(mut pipe: impl Read + Send + 'static, kind: Kind, sink: &Arc<Mutex<File>>, done: &Sender<()>) {
    let (sink, done) = (Arc::clone(sink), done.clone());
    thread::spawn(move || {
        let mut bytes = vec![0; frame::MAX_PAYLOAD];
        loop {
            let read = match pipe.read(&mut bytes) {
                Ok(0) => break,
                Ok(length) => bytes.get(..length).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            if send(&sink, kind, read).is_err() {
                break;
            }
        }
        // The waiter may have given up already.
        let _ = done.send(());
    });
}
