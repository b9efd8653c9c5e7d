// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The command-driven C tools in the introspector, as the scenarios talk to them.

use anyhow::{Context, Result, bail};
use kvmmem::Token;
use kvmmem_guest::{Agent, Child, Command};
use kvmmem_proto::guest::GUEST_PORT;

use crate::wait::PATIENCE;

/// How long a tool loads or polls for what must come.
pub(crate) const SPIN_MS: u32 = 60_000;

/// The value of a command, or the name of the errno or of the signal that it ended in.
pub(crate) type Answer = Result<String, String>;

/// One running `kvmmem-raw` or `kvmmem-view`.
pub(crate) struct Raw {
    pub(crate) child: Child,
}

impl Raw {
    pub(crate) fn start(agent: &Agent, command: &Command) -> Result<Self> {
        Ok(Self { child: agent.spawn(command)? })
    }

    /// Sends one command and waits for its answer.
    pub(crate) fn ask(&mut self, command: &str) -> Result<Answer> {
        self.child.write_stdin(format!("{command}\n").as_bytes())?;
        self.answer(command)
    }

    /// Sends a command that takes its time, and waits until the tool is at it. [`Self::answer`]
    /// waits for its answer.
    pub(crate) fn begin(&mut self, command: &str) -> Result<()> {
        self.must(&format!("announce {command}")).map(drop)
    }

    /// Loads the `u64` at `address` until it has changed three times; how often it did before the
    /// tool gave up.
    pub(crate) fn changes(&mut self, address: u64) -> Result<u64> {
        let changes = self.must(&format!("spin {address:#x} {SPIN_MS} 3"))?;
        u64::from_str_radix(changes.trim_start_matches("0x"), 16).with_context(|| changes)
    }

    /// Waits for the answer to a command that was sent.
    pub(crate) fn answer(&mut self, command: &str) -> Result<Answer> {
        let line = self
            .child
            .read_line(PATIENCE)?
            .with_context(|| format!("the raw tool ended at {command:?}"))?;
        match line.split_once(' ') {
            Some(("ok", value)) => Ok(Ok(value.trim().to_owned())),
            Some(("errno" | "signal", name)) => Ok(Err(name.to_owned())),
            None if line == "ok" => Ok(Ok(String::new())),
            _ => bail!("the raw tool answered {line:?} to {command:?}"),
        }
    }

    /// Sends a command that has to succeed.
    pub(crate) fn must(&mut self, command: &str) -> Result<String> {
        match self.ask(command)? {
            Ok(value) => Ok(value),
            Err(errno) => bail!("{command}: {errno}"),
        }
    }

    /// A new anonymous page.
    pub(crate) fn page(&mut self) -> Result<String> {
        self.must("page anon")
    }

    /// Opens the device.
    pub(crate) fn open(&mut self) -> Result<String> {
        self.must("open")
    }

    pub(crate) fn map(
        &mut self,
        slot: &str,
        page: &str,
        gpa: u64,
        token: [u64; 4],
    ) -> Result<Answer> {
        let [a, b, c, d] = token;
        self.ask(&format!("map {slot} {page} {gpa:#x} {a:#x} {b:#x} {c:#x} {d:#x}"))
    }

    pub(crate) fn unmap(&mut self, slot: &str, page: &str) -> Result<Answer> {
        self.ask(&format!("unmap {slot} {page}"))
    }

    /// Opens the device and attaches a view with `token`.
    pub(crate) fn view(&mut self, token: [u64; 4]) -> Result<String> {
        let slot = self.open()?;
        match self.attach(&slot, token)? {
            Ok(_) => Ok(slot),
            Err(errno) => bail!("attach: {errno}"),
        }
    }

    pub(crate) fn attach(&mut self, slot: &str, token: [u64; 4]) -> Result<Answer> {
        let [a, b, c, d] = token;
        self.ask(&format!("attach {slot} 0 {a:#x} {b:#x} {c:#x} {d:#x}"))
    }

    /// Has the host of a stock QEMU open a view read-only, and attaches it: the slots of the
    /// connection, whose closing is the view's end, and of the device. The host's words where
    /// it refuses.
    pub(crate) fn open_view(&mut self, token: &Token) -> Result<Result<(String, String), String>> {
        let answer = match self.ask(&format!("ask {GUEST_PORT} ro {}", token.to_hex().as_str()))? {
            Ok(answer) => answer,
            Err(words) => return Ok(Err(words)),
        };
        let (connection, ticket) =
            answer.split_once(' ').context("the connection gave no ticket")?;
        let ticket: Token = ticket.parse().context("the connection's ticket is none")?;
        Ok(Ok((connection.to_owned(), self.view(ticket.words())?)))
    }

    /// Maps `len` bytes of the target from `gpa` on, shared.
    pub(crate) fn mmap(
        &mut self,
        slot: &str,
        gpa: u64,
        len: u64,
        protection: &str,
    ) -> Result<Answer> {
        self.ask(&format!("mmap {slot} {gpa:#x} {len:#x} {protection} shared"))
    }

    /// What `count` loads from `address` on find.
    pub(crate) fn load(&mut self, address: &str, count: usize) -> Result<Answer> {
        self.ask(&format!("load {address} {count}"))
    }

    pub(crate) fn pread(&mut self, slot: &str, gpa: u64, count: usize) -> Result<Answer> {
        self.ask(&format!("pread {slot} {gpa:#x} {count}"))
    }

    /// The first 48 bytes of a page in hex.
    pub(crate) fn read(&mut self, page: &str) -> Result<String> {
        self.must(&format!("read {page}"))
    }

    /// Whether the first 48 bytes of a page are zero.
    pub(crate) fn is_zero(&mut self, page: &str) -> Result<bool> {
        Ok(self.read(page)?.bytes().all(|digit| digit == b'0'))
    }
}

/// The errno that an answer is, or "0".
pub(crate) fn errno(answer: Answer) -> String {
    answer.map_or_else(|errno| errno, |_| "0".to_owned())
}
