// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What may be asked of an agent, and its answers, as JSON.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::{KVMMEM_GID, USER_ID};

/// The first frame of a connection to an agent; a connection carries one request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Request {
    /// Run a program. Answered by `Stdout`, `Stderr` and `Exit` frames.
    Exec(Command),
    /// Write a file from the `Data` frames that follow.
    Put {
        /// Where; missing folders are made.
        path: String,
        /// Its permission bits.
        mode: u32,
        /// Its length in bytes.
        length: u64,
    },
    /// Read a file: `Data` frames, then the reply.
    Get {
        /// Which.
        path: String,
    },
    /// Load a kernel module from a plain `.ko` file in the VM.
    LoadModule {
        /// The file.
        path: String,
        /// Its parameters, as on `insmod`'s command line.
        parameters: String,
    },
    /// Unload a kernel module, without waiting while it is in use.
    UnloadModule {
        /// Its name.
        name: String,
    },
    /// Power the VM off.
    Poweroff {},
}

/// The answer to every request but `Exec`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reply {
    /// Why it failed, if it did.
    pub error: Option<Failure>,
}

/// Why a request failed inside the VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// The system call's error number, where it was one.
    pub errno: Option<i32>,
    /// The same in words.
    pub message: String,
}

impl From<std::io::Error> for Failure {
    fn from(error: std::io::Error) -> Self {
        Self { errno: error.raw_os_error(), message: error.to_string() }
    }
}

/// A program to run inside a VM, as a builder.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Command {
    /// The program, an absolute path, and its arguments.
    pub argv: Vec<String>,
    /// Its environment, beyond `PATH` and `HOME`.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// User id; 0 if not given.
    #[serde(default)]
    pub uid: u32,
    /// Group id; 0 if not given.
    #[serde(default)]
    pub gid: u32,
    /// Supplementary groups.
    #[serde(default)]
    pub groups: Vec<u32>,
    /// Working directory, `/` if not given.
    #[serde(default)]
    pub cwd: Option<String>,
    /// RLIMIT_MEMLOCK in bytes, both soft and hard, where another one than the VM's default is
    /// wanted.
    #[serde(default)]
    pub memlock: Option<u64>,
}

impl Command {
    /// `program` is an absolute path inside the VM. Runs as root by default.
    pub fn new(program: impl Into<String>) -> Self {
        Self { argv: vec![program.into()], ..Self::default() }
    }

    /// Adds one argument.
    #[must_use]
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.argv.push(arg.into());
        self
    }

    /// Adds arguments.
    #[must_use]
    pub fn args<S: Into<String>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.argv.extend(args.into_iter().map(Into::into));
        self
    }

    /// Sets a variable of its environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.env.insert(name.into(), value.into());
        self
    }

    /// Runs it as this user, in these supplementary groups.
    #[must_use]
    pub fn user(mut self, uid: u32, gid: u32, groups: &[u32]) -> Self {
        (self.uid, self.gid, self.groups) = (uid, gid, groups.to_vec());
        self
    }

    /// Runs it as the normal user, a member of group `kvmmem`.
    #[must_use]
    pub fn as_member(self) -> Self {
        self.user(USER_ID, USER_ID, &[KVMMEM_GID])
    }

    /// Runs it as another user, who is not a member of group `kvmmem`.
    #[must_use]
    pub fn as_other_user(self) -> Self {
        self.user(USER_ID + 1, USER_ID + 1, &[])
    }

    /// Sets its working directory.
    #[must_use]
    pub fn cwd(mut self, path: impl Into<String>) -> Self {
        self.cwd = Some(path.into());
        self
    }

    /// Sets its RLIMIT_MEMLOCK, in bytes.
    #[must_use]
    pub fn memlock(mut self, bytes: u64) -> Self {
        self.memlock = Some(bytes);
        self
    }
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitStatus {
    /// It exited with this code. 127 when it could not be run at all; stderr then has the reason.
    Code(i32),
    /// This signal killed it.
    Signal(i32),
}

impl ExitStatus {
    /// Whether it exited with 0.
    #[must_use]
    pub fn success(self) -> bool {
        self == Self::Code(0)
    }

    /// The status as a shell would give it: 128 and the signal's number for a killed program.
    #[must_use]
    pub fn shell_code(self) -> i32 {
        match self {
            Self::Code(code) => code,
            Self::Signal(signal) => 128_i32.saturating_add(signal),
        }
    }
}

impl std::fmt::Display for ExitStatus {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Code(code) => write!(out, "exit status {code}"),
            Self::Signal(signal) => write!(out, "killed by signal {signal}"),
        }
    }
}
