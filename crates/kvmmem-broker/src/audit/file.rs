// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The audit log's file.

use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use kvmmem_limit::RateLimit;

use serde::Serialize;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

use super::movable::AuditFile;
use super::record::Record;

/// Peers cause the lines, and a slow disk stalls again and again.
static WARNINGS: RateLimit = RateLimit::new(2);

/// The most lines that wait to be written.
const MAX_WAITING: usize = 4096;

/// What a line and its time usually take up, bytes: most are written into memory of this size.
const USUAL_LINE: usize = 512;
const USUAL_TIME: usize = 32;

/// How long the caller waits until its line is written.
const LIMIT: Duration = Duration::from_secs(1);

/// A file of JSON objects, one a line. One thread writes them, so that a stalled disk blocks the
/// caller for at most [`LIMIT`], and the callers after it not at all until the disk works again.
#[derive(Debug)]
pub(super) struct Lines {
    waiting: SyncSender<PendingLine>,
    is_stalled: Arc<AtomicBool>,
    /// How many lines were left out since the last that was not.
    lost: AtomicU64,
}

/// A line that is to be written, and the channel to the caller that waits for it.
#[derive(Debug)]
struct PendingLine {
    line: Vec<u8>,
    written: SyncSender<()>,
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    #[serde(flatten)]
    record: &'a Record<'a>,
}

impl Lines {
    pub(super) fn new(file: AuditFile) -> io::Result<Self> {
        let (waiting, lines) = sync_channel(MAX_WAITING);
        let is_stalled = Arc::new(AtomicBool::new(false));
        let appender = Appender {
            file,
            is_broken: false,
            is_told: false,
            is_stalled: Arc::clone(&is_stalled),
        };
        std::thread::Builder::new().name("audit".into()).spawn(move || appender.run(&lines))?;
        Ok(Self { waiting, is_stalled, lost: AtomicU64::new(0) })
    }

    /// Appends a line, which is in the file when this returns, unless the file stalls or cannot be
    /// written to.
    pub(super) fn write(&self, record: &Record<'_>) {
        let mut line = Vec::with_capacity(USUAL_LINE);
        // A record is made of strings and numbers, and a vector takes all that is written to it.
        let _ = serde_json::to_writer(&mut line, &Line { time: now(), record });
        line.push(b'\n');
        let (written, is_written) = sync_channel(1);
        if self.waiting.try_send(PendingLine { line, written }).is_err() {
            if self.lost.fetch_add(1, Ordering::Relaxed) == 0
                && let Some(suppressed) = WARNINGS.allow(Instant::now())
            {
                tracing::error!(
                    suppressed,
                    "the audit log's file stalls; lines are left out there"
                );
            }
            return;
        }
        let lost = self.lost.swap(0, Ordering::Relaxed);
        if lost > 0
            && let Some(suppressed) = WARNINGS.allow(Instant::now())
        {
            tracing::error!(
                suppressed,
                lost,
                "lines were left out in the audit log's file while it stalled"
            );
        }
        if !self.is_stalled.load(Ordering::Relaxed)
            && is_written.recv_timeout(LIMIT) == Err(RecvTimeoutError::Timeout)
            && !self.is_stalled.swap(true, Ordering::Relaxed)
            && let Some(suppressed) = WARNINGS.allow(Instant::now())
        {
            tracing::warn!(
                suppressed,
                "the audit log's file stalls; its lines are written once it works again"
            );
        }
    }
}

/// What the thread has.
struct Appender {
    file: AuditFile,
    /// Whether the last line may have been written in part.
    is_broken: bool,
    is_told: bool,
    is_stalled: Arc<AtomicBool>,
}

impl Appender {
    fn run(mut self, lines: &Receiver<PendingLine>) {
        for PendingLine { line, written } in lines {
            self.write(&line);
            self.is_stalled.store(false, Ordering::Relaxed);
            // The caller may have stopped waiting.
            let _ = written.send(());
        }
    }

    /// Appends a line. A failure is told once: it must neither stop the service nor fill its log.
    fn write(&mut self, line: &[u8]) {
        let begun = if self.is_broken { self.file.write_all(b"\n") } else { Ok(()) };
        let written = begun.and_then(|()| self.file.write_all(line));
        self.is_broken = written.is_err();
        if let Err(error) = written
            && !std::mem::replace(&mut self.is_told, true)
        {
            tracing::error!(%error, "cannot write to the audit log's file; lines are missing there");
        }
    }
}

/// The time in UTC by RFC 3339.
fn now() -> String {
    let mut time = String::with_capacity(USUAL_TIME);
    // Writing to a string cannot fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut time));
    time
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::path::Path;

    use super::*;

    #[test]
    fn a_line_is_one_object() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let lines = Lines::new(AuditFile::open(file.path()).unwrap()).unwrap();
        let record = Record {
            event: "granted",
            label: Some("two\nlines \"quoted\""),
            grant: Some(7),
            ..Record::default()
        };
        lines.write(&record);
        lines.write(&record);
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert_eq!(text.lines().count(), 2);
        for line in text.lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!((&line["event"], &line["grant"]), (&"granted".into(), &7.into()));
            assert_eq!(line["label"], "two\nlines \"quoted\"");
            let time = line["time"].as_str().unwrap();
            assert!(
                time.len() >= 20 && time.ends_with('Z') && time.as_bytes()[10] == b'T',
                "{time}"
            );
            assert!(line.get("view").is_none());
        }
    }

    #[test]
    fn a_full_disk_is_survived() {
        let lines = Lines::new(AuditFile::open(Path::new("/dev/full")).unwrap()).unwrap();
        for _ in 0..3 {
            lines.write(&Record::default());
        }
        assert!(!lines.is_stalled.load(Ordering::Relaxed));
    }

    #[test]
    fn a_file_that_stalls_holds_up_nobody() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        rustix::fs::mkfifoat(
            rustix::fs::CWD,
            &path,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
        )
        .unwrap();
        // Opened for both, so that the open does not block; nothing is read at first.
        let mut reader = std::fs::File::options().read(true).write(true).open(&path).unwrap();
        let lines = Lines::new(AuditFile::open(&path).unwrap()).unwrap();
        let label = "x".repeat(1000);
        let record = Record { label: Some(&label), ..Record::default() };
        // More than the pipe and the queue hold together; without the thread the first hundred
        // would never end.
        for _ in 0..MAX_WAITING + 200 {
            lines.write(&record);
        }
        assert!(lines.is_stalled.load(Ordering::Relaxed) && lines.lost.load(Ordering::Relaxed) > 0);
        let drain = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while !bytes.contains(&b'!') {
                bytes.fill(0);
                let _ = reader.read(&mut bytes).unwrap();
            }
        });
        let last = Record { label: Some("!"), ..Record::default() };
        while !drain.is_finished() {
            lines.write(&last);
        }
        drain.join().unwrap();
    }
}
