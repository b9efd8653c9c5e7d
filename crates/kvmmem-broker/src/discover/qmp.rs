// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Questions to a QEMU over its machine protocol, QMP: lines of JSON over a unix socket.
//!
//! QEMU serves one client at a time; others connect and hear nothing. So the whole conversation has one deadline.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use crate::connect::connect;
use crate::endpoint::Endpoint;

/// How long a conversation may take.
pub const LIMIT: Duration = Duration::from_secs(2);

/// The most that is read in a conversation, bytes. A memory tree of some 100 devices has 200 KiB.
const MAX_RECEIVED: usize = 8 * 1024 * 1024;

/// A connection that QEMU answers on.
#[derive(Debug)]
pub struct Qmp {
    path: PathBuf,
    stream: UnixStream,
    deadline: Instant,
    /// What was received behind the last line.
    buffer: Vec<u8>,
    received: usize,
}

/// A memory backend, as `query-memdev` lists it.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct MemoryBackend {
    /// Its id; some have none.
    pub id: Option<String>,
    /// Bytes.
    pub size: u64,
    /// Whether others can see its memory; QEMU before 6.1 does not say.
    pub share: Option<bool>,
}

/// How much RAM there is, as `query-memory-size-summary` says, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct MemorySize {
    /// From the start.
    pub base_memory: u64,
    /// In devices that can be unplugged.
    #[serde(default)]
    pub plugged_memory: u64,
}

/// Why QEMU gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum QmpError {
    /// Nobody listens.
    #[error("cannot connect to the QMP socket {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There was no answer in time.
    #[error("nothing answers at the QMP socket {0} in time; is another client connected to it?")]
    Silent(PathBuf),
    /// The connection failed.
    #[error("the connection to the QMP socket {path} failed")]
    Connection {
        /// The socket.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// More came than QEMU ever says.
    #[error("the QMP socket {0} sends without end")]
    TooMuch(PathBuf),
    /// What came is not QMP, or not the answer.
    #[error("what the QMP socket {path} sends is not the answer to {command}")]
    Garbage {
        /// The socket.
        path: PathBuf,
        /// What was asked.
        command: &'static str,
    },
    /// QEMU knows the question and does not answer it.
    #[error("QEMU refuses {command}: {description}")]
    Refused {
        /// What was asked.
        command: &'static str,
        /// QEMU's words.
        description: String,
    },
}

/// What QEMU sends.
#[derive(Deserialize)]
struct Message {
    #[serde(rename = "QMP")]
    greeting: Option<Value>,
    #[serde(rename = "return")]
    answer: Option<Value>,
    error: Option<Failure>,
}

#[derive(Deserialize)]
struct Failure {
    desc: String,
}

impl Qmp {
    /// Connects, and does what QEMU wants before it answers.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn connect(path: &Path) -> Result<Self, QmpError> {
        let deadline = Instant::now() + LIMIT;
        let socket = connect(&Endpoint::Unix(path.to_owned()));
        let socket = socket.map_err(|source| QmpError::Connect { path: path.to_owned(), source })?;
        let mut qmp = Self {
            path: path.to_owned(),
            stream: UnixStream::from(socket),
            deadline,
            buffer: Vec::new(),
            received: 0,
        };
        // Nothing is sent to what does not greet as QEMU does.
        const GREETING: &str = "the connection";
        if qmp.message(GREETING)?.greeting.is_none() {
            return Err(qmp.garbage(GREETING));
        }
        qmp.ask::<Value>("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// The process that listens: QEMU itself, or whoever handed it the socket.
    pub fn listener(&self) -> Option<u32> {
        let credentials = rustix::net::sockopt::socket_peercred(&self.stream).ok()?;
        u32::try_from(credentials.pid.as_raw_nonzero().get()).ok()
    }

    /// The memory backends.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn memory_backends(&mut self) -> Result<Vec<MemoryBackend>, QmpError> {
        self.ask("query-memdev", json!({}))
    }

    /// How much RAM there is.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn memory_size(&mut self) -> Result<MemorySize, QmpError> {
        self.ask("query-memory-size-summary", json!({}))
    }

    /// Number of vCPUs.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn vcpus(&mut self) -> Result<u32, QmpError> {
        let vcpus: Vec<Value> = self.ask("query-cpus-fast", json!({}))?;
        u32::try_from(vcpus.len()).map_err(|_| self.garbage("query-cpus-fast"))
    }

    /// The text of `info mtree -f`.
    ///
    /// # Errors
    /// [`QmpError`].
    pub fn memory_tree(&mut self) -> Result<String, QmpError> {
        self.ask("human-monitor-command", json!({ "command-line": "info mtree -f" }))
    }

    fn ask<T: DeserializeOwned>(&mut self, command: &'static str, arguments: Value) -> Result<T, QmpError> {
        let mut text = json!({ "execute": command, "arguments": arguments }).to_string();
        text.push('\n');
        self.limit()?;
        self.stream.write_all(text.as_bytes()).map_err(|source| self.failed(source))?;
        loop {
            let message = self.message(command)?;
            if let Some(Failure { desc }) = message.error {
                let description = desc.chars().take(200).collect();
                return Err(QmpError::Refused { command, description });
            }
            if let Some(answer) = message.answer {
                return serde_json::from_value(answer).map_err(|_| self.garbage(command));
            }
            // An event.
        }
    }

    fn message(&mut self, command: &'static str) -> Result<Message, QmpError> {
        let line = self.line()?;
        serde_json::from_slice(&line).map_err(|_| self.garbage(command))
    }

    fn line(&mut self) -> Result<Vec<u8>, QmpError> {
        let mut searched = 0;
        loop {
            let unsearched = self.buffer.get(searched..).unwrap_or_default();
            if let Some(end) = unsearched.iter().position(|byte| *byte == b'\n') {
                let rest = self.buffer.split_off(searched + end + 1);
                return Ok(std::mem::replace(&mut self.buffer, rest));
            }
            searched = self.buffer.len();
            self.limit()?;
            let mut chunk = [0; 16 * 1024];
            let count = match self.stream.read(&mut chunk) {
                Ok(0) => return Err(self.failed(io::ErrorKind::UnexpectedEof.into())),
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(self.failed(error)),
            };
            self.received += count;
            if self.received > MAX_RECEIVED {
                return Err(QmpError::TooMuch(self.path.clone()));
            }
            self.buffer.extend_from_slice(chunk.get(..count).unwrap_or_default());
        }
    }

    /// Lets the next call take as long as the whole conversation may.
    fn limit(&self) -> Result<(), QmpError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(QmpError::Silent(self.path.clone()));
        }
        let set =
            self.stream.set_read_timeout(Some(left)).and_then(|()| self.stream.set_write_timeout(Some(left)));
        set.map_err(|source| self.failed(source))
    }

    fn failed(&self, source: io::Error) -> QmpError {
        match source.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => QmpError::Silent(self.path.clone()),
            _ => QmpError::Connection { path: self.path.clone(), source },
        }
    }

    fn garbage(&self, command: &'static str) -> QmpError {
        QmpError::Garbage { path: self.path.clone(), command }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;
    use std::thread::JoinHandle;

    use super::*;

    const GREETING: &str = "{\"QMP\":{\"version\":{},\"capabilities\":[]}}\n";

    /// Listens, and sends `lines` to the first that connects, one for the connection and one for each line it gets;
    /// then stays silent until the client goes.
    fn serve(lines: Vec<String>) -> (tempfile::TempDir, PathBuf, JoinHandle<()>) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("qmp.sock");
        let listener = UnixListener::bind(&path).unwrap();
        let thread = std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let mut requests = io::BufReader::new(stream.try_clone().unwrap());
            for line in lines {
                if stream.write_all(line.as_bytes()).is_err() {
                    return;
                }
                let mut request = String::new();
                let _ = io::BufRead::read_line(&mut requests, &mut request);
            }
            let _ = requests.read_to_end(&mut Vec::new());
        });
        (directory, path, thread)
    }

    fn backends(lines: &[&str]) -> Result<Vec<MemoryBackend>, QmpError> {
        let (_directory, path, thread) = serve(lines.iter().map(|line| (*line).to_owned()).collect());
        let answer = Qmp::connect(&path).and_then(|mut qmp| qmp.memory_backends());
        thread.join().unwrap();
        answer
    }

    #[test]
    fn answers_are_found_between_events() {
        let answer = "{\"event\":\"RESET\",\"data\":{}}\n{\"return\":[{\"id\":\"m\",\"size\":5,\"share\":true,\"x\":1}]}\n";
        let expected = MemoryBackend { id: Some("m".into()), size: 5, share: Some(true) };
        assert_eq!(backends(&[GREETING, "{\"return\":{}}\n", answer]).unwrap(), [expected]);
    }

    #[test]
    fn garbage_is_refused() {
        let ready = "{\"return\":{}}\n";
        for lines in [
            vec!["SSH-2.0-x\n"],
            vec!["{}\n"],
            vec!["{\"return\":{}}\n"],
            vec![GREETING, "]\n"],
            vec![GREETING, ready, "{\"return\":{}}\n"],
            vec![GREETING, ready, "{\"return\":[{\"id\":1}]}\n"],
            vec![GREETING, ready, "\u{0}\n"],
        ] {
            assert!(matches!(backends(&lines), Err(QmpError::Garbage { .. })), "{lines:?}");
        }
        let deep = "[".repeat(100_000) + "\n";
        assert!(matches!(backends(&[&deep]), Err(QmpError::Garbage { .. })));
        let refusal = "{\"error\":{\"class\":\"CommandNotFound\",\"desc\":\"no\"}}\n";
        assert!(matches!(backends(&[GREETING, ready, refusal]), Err(QmpError::Refused { .. })));
    }

    #[test]
    fn what_hangs_or_never_ends_is_left() {
        let began = Instant::now();
        assert!(matches!(backends(&[]), Err(QmpError::Silent(_))));
        assert!(matches!(backends(&[GREETING, "{\"return\""]), Err(QmpError::Silent(_))));
        assert!(began.elapsed() < LIMIT * 4);
        let endless = "x".repeat(MAX_RECEIVED + 1);
        assert!(matches!(backends(&[&endless]), Err(QmpError::TooMuch(_))));
        let event = format!("{{\"event\":\"{}\"}}\n", "X".repeat(100_000));
        let events = event.repeat(MAX_RECEIVED / 100_000 + 1);
        assert!(matches!(backends(&[GREETING, &events]), Err(QmpError::TooMuch(_))));
        let nowhere = Path::new("/nowhere/qmp.sock");
        assert!(matches!(Qmp::connect(nowhere), Err(QmpError::Connect { .. })));
    }
}
