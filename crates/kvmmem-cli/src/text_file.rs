// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Files of text that the command line names: patterns and tokens. They may be pipes, as a shell
//! makes them (`--patterns <(command)`).

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Result, anyhow};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::io::retry_on_intr;

/// How long a pipe may be empty before a message says so.
const PATIENCE: Duration = Duration::from_secs(1);

/// Opens a file, and waits until there is something to read: a pipe's writer may start later.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    let nonblocking = OFlags::NONBLOCK.bits().cast_signed();
    let file = OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?;
    let wait = |limit: Option<Timespec>| {
        retry_on_intr(|| poll(&mut [PollFd::new(&file, PollFlags::IN)], limit.as_ref()))
    };
    let patience = Timespec::try_from(PATIENCE).map_err(|_| io::ErrorKind::InvalidInput)?;
    if wait(Some(patience))? == 0 {
        tracing::warn!("{} is a pipe; still waiting for its writer", path.display());
        wait(None)?;
    }
    fcntl_setfl(&file, fcntl_getfl(&file)? - OFlags::NONBLOCK)?;
    Ok(file)
}

/// The text in a file of patterns or rules.
pub(crate) fn utf8(bytes: Vec<u8>) -> Result<String> {
    String::from_utf8(bytes).map_err(|error| {
        let before = error.as_bytes().get(..error.utf8_error().valid_up_to()).unwrap_or_default();
        let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
        anyhow!("line {line} is not UTF-8 text: write such bytes in hexadecimal")
    })
}
