// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The client of a VM's agent. Every wait has a limit, every answer a largest size.

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::thread;
use std::time::{Duration, Instant};

use vsock::VsockStream;

use crate::AGENT_PORT;
use crate::channel::Channel;
use crate::frame::{Frame, Kind};
use crate::request::{Command, ExitStatus, Failure, Reply, Request};

/// Most that a process may print to one stream, and the longest file that may be got, in bytes.
pub const MAX_OUTPUT: usize = 16 << 20;

/// Limit of the small requests.
const PATIENCE: Duration = Duration::from_secs(120);

/// How long dropping a [`Child`] waits for the agent, which is silent where its VM stands still.
const ENDING: Duration = Duration::from_secs(30);

/// Why something asked of an agent failed.
#[derive(Debug, thiserror::Error)]
pub enum AgentError {
    /// No connection within the limit.
    #[error("cannot connect to the agent of the VM with CID {cid}")]
    Connect {
        /// The VM's vsock context id.
        cid: u32,
        /// The last try's error.
        source: io::Error,
    },
    /// The connection failed, or (`TimedOut`) its peer was silent for too long.
    #[error("{operation}: the connection to the agent failed")]
    Connection {
        /// What was asked.
        operation: String,
        /// The socket's error.
        source: io::Error,
    },
    /// The agent closed the connection before it had answered: the VM died, mostly.
    #[error("{operation}: the agent closed the connection")]
    Closed {
        /// What was asked.
        operation: String,
    },
    /// The agent could not do it.
    #[error("{operation}: {message}")]
    Refused {
        /// What was asked.
        operation: String,
        /// The system call's error number inside the VM, if it was one.
        errno: Option<i32>,
        /// The same in words.
        message: String,
    },
    /// The answer does not fit the request.
    #[error("{operation}: unexpected answer")]
    Protocol {
        /// What was asked.
        operation: String,
    },
    /// The answer exceeds [`MAX_OUTPUT`].
    #[error("{operation}: more than {MAX_OUTPUT} bytes")]
    TooMuch {
        /// What was asked.
        operation: String,
    },
}

impl AgentError {
    /// The error number that the VM's kernel gave, if it was the kernel that refused.
    #[must_use]
    pub fn errno(&self) -> Option<i32> {
        if let Self::Refused { errno, .. } = self { *errno } else { None }
    }

    /// Whether the time limit was the reason.
    #[must_use]
    pub fn is_timeout(&self) -> bool {
        matches!(self, Self::Connection { source, .. } if source.kind() == io::ErrorKind::TimedOut)
    }
}

/// The agent of one VM. Each request uses a connection of its own.
#[derive(Clone, Debug)]
pub struct Agent {
    cid: u32,
}

/// What a process printed and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Output {
    /// How it ended.
    pub status: ExitStatus,
    /// Its stdout.
    pub stdout: Vec<u8>,
    /// Its stderr.
    pub stderr: Vec<u8>,
}

impl Output {
    /// Stdout as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Stderr as text.
    #[must_use]
    pub fn error_text(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

impl Agent {
    /// Waits until the VM with this vsock context id answers.
    ///
    /// # Errors
    /// [`AgentError::Connect`] when it does not within `limit`.
    pub fn connect(cid: u32, limit: Duration) -> Result<Self, AgentError> {
        let agent = Self { cid };
        let deadline = Instant::now() + limit;
        loop {
            match agent.open() {
                // An agent that is asked nothing closes the connection in turn.
                Ok(_) => return Ok(agent),
                Err(source) if Instant::now() >= deadline => {
                    return Err(AgentError::Connect { cid, source });
                }
                Err(_) => thread::sleep(Duration::from_millis(100)),
            }
        }
    }

    /// The VM's vsock context id.
    #[must_use]
    pub fn cid(&self) -> u32 {
        self.cid
    }

    /// Runs a program to its end, at most for `limit`; it is killed then.
    ///
    /// # Errors
    /// When the VM or the agent fails. A program that fails is not an error: see
    /// [`Output::status`].
    pub fn run(&self, command: &Command, limit: Duration) -> Result<Output, AgentError> {
        let mut child = self.spawn(command)?;
        child.close_stdin()?;
        child.wait_with_output(limit)
    }

    /// Starts a program. Dropping the [`Child`] kills it.
    ///
    /// # Errors
    /// When the agent cannot be reached.
    pub fn spawn(&self, command: &Command) -> Result<Child, AgentError> {
        let operation = format!("run {}", command.argv.join(" "));
        let channel = self.ask(&operation, &Request::Exec(command.clone()))?;
        Ok(Child {
            channel,
            operation,
            stdout: Stream::default(),
            stderr: Stream::default(),
            status: None,
        })
    }

    /// Writes a file of the VM, with these permission bits.
    ///
    /// # Errors
    /// When the VM's file system refuses, or the agent fails.
    pub fn put(&self, path: &str, mode: u32, bytes: &[u8]) -> Result<(), AgentError> {
        let operation = format!("put {path}");
        let length = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
        let mut channel =
            self.ask(&operation, &Request::Put { path: path.to_owned(), mode, length })?;
        // A refusal comes while the bytes are still being sent: the answer has the reason, not the
        // broken pipe.
        let sent = if bytes.is_empty() { Ok(()) } else { channel.send(Kind::Data, bytes) };
        let answered = answer(&mut channel, &operation);
        match (sent, &answered) {
            (Err(source), Err(AgentError::Closed { .. } | AgentError::Connection { .. })) => {
                Err(AgentError::Connection { operation, source })
            }
            _ => answered,
        }
    }

    /// Reads a file of the VM.
    ///
    /// # Errors
    /// When the VM's file system refuses, the file is too long, or the agent fails.
    pub fn get(&self, path: &str) -> Result<Vec<u8>, AgentError> {
        let operation = format!("get {path}");
        let mut channel = self.ask(&operation, &Request::Get { path: path.to_owned() })?;
        let deadline = Instant::now() + PATIENCE;
        let mut bytes = Vec::new();
        loop {
            let frame = receive(&mut channel, &operation, deadline)?;
            if frame.kind != Kind::Data {
                return done(&frame, &operation).map(|()| bytes);
            }
            if bytes.len() + frame.payload.len() > MAX_OUTPUT {
                return Err(AgentError::TooMuch { operation });
            }
            bytes.extend(frame.payload);
        }
    }

    /// Loads a plain `.ko` file of the VM.
    ///
    /// # Errors
    /// [`AgentError::Refused`] with the kernel's error number when the kernel refuses.
    pub fn load_module(&self, path: &str, parameters: &str) -> Result<(), AgentError> {
        let request =
            Request::LoadModule { path: path.to_owned(), parameters: parameters.to_owned() };
        self.simple(&format!("load module {path}"), &request)
    }

    /// Unloads a module, without waiting while it is in use.
    ///
    /// # Errors
    /// [`AgentError::Refused`] with the kernel's error number when the kernel refuses.
    pub fn unload_module(&self, name: &str) -> Result<(), AgentError> {
        self.simple(
            &format!("unload module {name}"),
            &Request::UnloadModule { name: name.to_owned() },
        )
    }

    /// Asks the VM to power itself off; it does so after this has returned.
    ///
    /// # Errors
    /// When the agent fails.
    pub fn poweroff(&self) -> Result<(), AgentError> {
        self.simple("power off", &Request::Poweroff {})
    }

    fn open(&self) -> io::Result<Channel> {
        let stream = VsockStream::connect_with_cid_port(self.cid, AGENT_PORT)?;
        let channel = Channel::new(OwnedFd::from(stream));
        channel.set_write_timeout(PATIENCE)?;
        Ok(channel)
    }

    fn ask(&self, operation: &str, request: &Request) -> Result<Channel, AgentError> {
        let send = || {
            let mut channel = self.open()?;
            channel.send(Kind::Request, &serde_json::to_vec(request)?)?;
            Ok(channel)
        };
        send().map_err(|source| AgentError::Connection { operation: operation.to_owned(), source })
    }

    fn simple(&self, operation: &str, request: &Request) -> Result<(), AgentError> {
        answer(&mut self.ask(operation, request)?, operation)
    }
}

fn receive(channel: &mut Channel, operation: &str, deadline: Instant) -> Result<Frame, AgentError> {
    match channel.receive(Some(deadline)) {
        Ok(Some(frame)) => Ok(frame),
        Ok(None) => Err(AgentError::Closed { operation: operation.to_owned() }),
        Err(source) => Err(AgentError::Connection { operation: operation.to_owned(), source }),
    }
}

fn answer(channel: &mut Channel, operation: &str) -> Result<(), AgentError> {
    let frame = receive(channel, operation, Instant::now() + PATIENCE)?;
    done(&frame, operation)
}

fn done(frame: &Frame, operation: &str) -> Result<(), AgentError> {
    let operation = operation.to_owned();
    if frame.kind != Kind::Reply {
        return Err(AgentError::Protocol { operation });
    }
    match serde_json::from_slice(&frame.payload) {
        Ok(Reply { error: None }) => Ok(()),
        Ok(Reply { error: Some(Failure { errno, message }) }) => {
            Err(AgentError::Refused { operation, errno, message })
        }
        Err(_) => Err(AgentError::Protocol { operation }),
    }
}

/// Output of a process on one stream that the caller has not taken yet.
#[derive(Debug, Default)]
struct Stream {
    bytes: VecDeque<u8>,
}

impl Stream {
    fn take_line(&mut self) -> Option<String> {
        let end = self.bytes.iter().position(|&byte| byte == b'\n')?;
        let line: Vec<u8> = self.bytes.drain(..=end).collect();
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        Some(String::from_utf8_lossy(line).into_owned())
    }

    fn take(&mut self) -> Vec<u8> {
        self.bytes.drain(..).collect()
    }
}

/// A process in a VM. Dropping it kills the process and what it started, also where the process
/// itself has ended, and waits until their files and memory are released; only what made a session
/// of its own is left.
#[derive(Debug)]
pub struct Child {
    channel: Channel,
    operation: String,
    stdout: Stream,
    stderr: Stream,
    status: Option<ExitStatus>,
}

impl Child {
    /// The next line of its stdout, without the line's end; `None` when it has ended and all lines
    /// were read.
    ///
    /// # Errors
    /// [`AgentError::is_timeout`] when no line comes within `limit`; otherwise when the VM or the
    /// agent fails.
    pub fn read_line(&mut self, limit: Duration) -> Result<Option<String>, AgentError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(line) = self.stdout.take_line() {
                return Ok(Some(line));
            }
            if self.status.is_some() {
                let rest = self.stdout.take();
                return Ok((!rest.is_empty()).then(|| String::from_utf8_lossy(&rest).into_owned()));
            }
            self.advance(deadline)?;
        }
    }

    /// Writes to its stdin. The agent keeps what the process does not read yet, up to a limit.
    ///
    /// # Errors
    /// When the agent fails.
    pub fn write_stdin(&mut self, bytes: &[u8]) -> Result<(), AgentError> {
        if bytes.is_empty() { Ok(()) } else { self.send(Kind::Stdin, bytes) }
    }

    /// Closes its stdin.
    ///
    /// # Errors
    /// When the agent fails.
    pub fn close_stdin(&mut self) -> Result<(), AgentError> {
        self.send(Kind::Stdin, &[])
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When the agent fails. A process that has ended already is not an error.
    pub fn kill(&mut self, signal: i32) -> Result<(), AgentError> {
        if self.status.is_some() { Ok(()) } else { self.send(Kind::Signal, &signal.to_le_bytes()) }
    }

    /// Waits for its end; what it prints stays to be read.
    ///
    /// # Errors
    /// [`AgentError::is_timeout`] when it has not ended within `limit`; otherwise when the VM or
    /// the agent fails.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus, AgentError> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.status {
                return Ok(status);
            }
            self.advance(deadline)?;
        }
    }

    /// Waits for its end, and takes what it printed and has not been read.
    ///
    /// # Errors
    /// As [`Self::wait`]'s.
    pub fn wait_with_output(mut self, limit: Duration) -> Result<Output, AgentError> {
        let status = self.wait(limit)?;
        Ok(Output { status, stdout: self.stdout.take(), stderr: self.stderr.take() })
    }

    /// Takes what it has printed to stderr until now.
    pub fn take_stderr(&mut self) -> String {
        String::from_utf8_lossy(&self.stderr.take()).into_owned()
    }

    fn send(&mut self, kind: Kind, bytes: &[u8]) -> Result<(), AgentError> {
        match self.channel.send(kind, bytes) {
            // It may have ended meanwhile: then its exit status is still to be received.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) =>
            {
                Ok(())
            }
            Err(source) => {
                Err(AgentError::Connection { operation: self.operation.clone(), source })
            }
            Ok(()) => Ok(()),
        }
    }

    fn advance(&mut self, deadline: Instant) -> Result<(), AgentError> {
        let frame = receive(&mut self.channel, &self.operation, deadline)?;
        let stream = match frame.kind {
            Kind::Stdout => &mut self.stdout,
            Kind::Stderr => &mut self.stderr,
            Kind::Exit => {
                self.status = serde_json::from_slice(&frame.payload).ok();
                return match self.status {
                    Some(_) => Ok(()),
                    None => Err(AgentError::Protocol { operation: self.operation.clone() }),
                };
            }
            _ => {
                done(&frame, &self.operation)?;
                return Err(AgentError::Protocol { operation: self.operation.clone() });
            }
        };
        if stream.bytes.len() + frame.payload.len() > MAX_OUTPUT {
            return Err(AgentError::TooMuch { operation: self.operation.clone() });
        }
        stream.bytes.extend(frame.payload);
        Ok(())
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.channel.finish(Instant::now() + ENDING);
    }
}
