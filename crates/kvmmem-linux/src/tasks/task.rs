// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A task.

use std::time::Duration;

/// A process, or one of its threads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// Where its `struct task_struct` is.
    pub gva: u64,
    /// Its own id, in the first namespace.
    pub tid: u32,
    /// The process's.
    pub pid: u32,
    /// That of the process that it belongs to; `None` where it cannot be read, as for the values
    /// after it.
    pub ppid: Option<u32>,
    /// Real and effective user, and real group, in the first namespace.
    pub uid: Option<u32>,
    /// The user whose rights it has.
    pub euid: Option<u32>,
    /// Its group.
    pub gid: Option<u32>,
    /// As /proc/PID/stat shows it: R, S, D, T, t, X, Z, P or I; `?` where it cannot be read.
    pub state: char,
    /// When it began, since boot.
    pub start: Option<Duration>,
    /// Its name; empty where it cannot be read. What is not UTF-8 is replaced; control characters
    /// may be there.
    pub comm: String,
    /// Whether it is one of the kernel's own.
    pub is_kernel: bool,
    /// The command line.
    pub args: Args,
    /// Whether it changed during every read, so that its values may not belong together.
    pub is_torn: bool,
    /// Whether some of its values cannot be read.
    pub is_damaged: bool,
}

/// The command line of a process, or its environment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Args {
    /// Its words, as far as they could be read.
    pub words: Vec<String>,
    /// Whether more was not in memory, or is too long.
    pub is_cut: bool,
}

impl Args {
    /// Of strings that end with a zero each.
    pub(crate) fn new(bytes: &[u8], is_cut: bool) -> Self {
        let words = bytes.strip_suffix(&[0]).unwrap_or(bytes);
        let words =
            words.split(|byte| *byte == 0).map(|word| String::from_utf8_lossy(word).into_owned());
        Self { words: if bytes.is_empty() { Vec::new() } else { words.collect() }, is_cut }
    }

    /// Bytes that its words take: the guest may name any number of empty ones.
    pub(crate) fn size(&self) -> usize {
        self.words.iter().map(|word| size_of::<String>() + word.len()).sum()
    }
}
