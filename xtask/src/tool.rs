// SPDX-License-Identifier: Apache-2.0 OR MIT
//! External programs: their output goes to a log, and a failure shows the log's end.

use std::ffi::{OsStr, OsString};
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use anyhow::{Context as _, Result, anyhow};

/// Lines of a log that a failure shows.
const TAIL: usize = 20;

/// One run of an external program.
pub(crate) struct Tool {
    command: Command,
    words: Vec<OsString>,
    log: PathBuf,
}

impl Tool {
    /// `log` is appended to.
    pub(crate) fn new(program: impl AsRef<OsStr>, log: &Path) -> Self {
        let program = program.as_ref();
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        Self { command, words: vec![program.to_owned()], log: log.to_owned() }
    }

    /// The program as root: by sudo for other users.
    pub(crate) fn as_root(program: impl AsRef<OsStr>, log: &Path) -> Self {
        if is_root() {
            return Self::new(program, log);
        }
        let mut tool = Self::new("sudo", log);
        // sudo may ask for a password on the terminal.
        tool.command.stdin(Stdio::inherit());
        tool.arg(program)
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.words.push(arg.as_ref().to_owned());
        self.command.arg(arg);
        self
    }

    pub(crate) fn args<S: AsRef<OsStr>>(self, args: impl IntoIterator<Item = S>) -> Self {
        args.into_iter().fold(self, Self::arg)
    }

    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    pub(crate) fn dir(mut self, path: &Path) -> Self {
        self.command.current_dir(path);
        self
    }

    /// Runs it, stdout and stderr to the log.
    pub(crate) fn run(mut self) -> Result<()> {
        let log = self.open_log()?;
        self.command.stdout(log.try_clone()?).stderr(log);
        let status = self.command.status().with_context(|| self.missing())?;
        self.check(status)
    }

    /// Runs it and returns its stdout; stderr to the log.
    pub(crate) fn output(self) -> Result<String> {
        self.exits_with(0)
    }

    /// The same of one that must exit with `code`.
    pub(crate) fn exits_with(mut self, code: i32) -> Result<String> {
        let log = self.open_log()?;
        self.command.stdout(Stdio::piped()).stderr(log);
        let output = self.command.spawn().and_then(std::process::Child::wait_with_output);
        let output = output.with_context(|| self.missing())?;
        if output.status.code() != Some(code) {
            return Err(self.failed(output.status));
        }
        String::from_utf8(output.stdout)
            .with_context(|| format!("{} printed no UTF-8", self.line()))
    }

    fn line(&self) -> String {
        let words: Vec<_> = self.words.iter().map(|word| word.to_string_lossy()).collect();
        words.join(" ")
    }

    fn missing(&self) -> String {
        format!("cannot run {}", self.line())
    }

    fn open_log(&self) -> Result<File> {
        let open = || {
            let mut log = OpenOptions::new().create(true).append(true).open(&self.log)?;
            writeln!(log, "+ {}", self.line())?;
            Ok::<_, std::io::Error>(log)
        };
        open().with_context(|| format!("cannot write {}", self.log.display()))
    }

    fn check(&self, status: ExitStatus) -> Result<()> {
        if status.success() { Ok(()) } else { Err(self.failed(status)) }
    }

    fn failed(&self, status: ExitStatus) -> anyhow::Error {
        anyhow!("{}: {status}\n{}", self.line(), tail(&self.log))
    }
}

/// Whether this process is root.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Whether `program` is on the PATH.
pub(crate) fn is_installed(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|path| {
        std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
    })
}

/// The end of a log and where it is, for an error message.
pub(crate) fn tail(log: &Path) -> String {
    let bytes = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let lines: Vec<_> = text.lines().collect();
    let last = lines.get(lines.len().saturating_sub(TAIL)..).unwrap_or_default();
    format!("  | {}\n  the whole log: {}", last.join("\n  | "), log.display())
}
