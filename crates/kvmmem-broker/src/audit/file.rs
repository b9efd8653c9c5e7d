// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The audit log's file.

use std::io::Write;

use serde::Serialize;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};

use super::movable::AuditFile;
use super::record::Record;

/// A file of JSON objects, one a line.
#[derive(Debug)]
pub(super) struct Lines {
    file: AuditFile,
    /// Whether the last line may have been written in part.
    is_broken: bool,
    is_told: bool,
}

#[derive(Serialize)]
struct Line<'a> {
    time: String,
    #[serde(flatten)]
    record: &'a Record<'a>,
}

impl Lines {
    pub(super) fn new(file: AuditFile) -> Self {
        Self { file, is_broken: false, is_told: false }
    }

    /// Appends a line. A failure is told once: it must neither stop the service nor fill its log.
    pub(super) fn write(&mut self, record: &Record<'_>) {
        let mut bytes = if self.is_broken { vec![b'\n'] } else { Vec::new() };
        let written = serde_json::to_writer(&mut bytes, &Line { time: now(), record })
            .map_err(std::io::Error::from)
            .and_then(|()| {
                bytes.push(b'\n');
                self.file.write_all(&bytes)
            });
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
    let mut time = String::new();
    // A string takes whatever is written to it.
    let _ = SystemTime.format_time(&mut Writer::new(&mut time));
    time
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::record::Event;
    use super::*;

    #[test]
    fn a_line_is_one_object() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut lines = Lines::new(AuditFile::open(file.path()).unwrap());
        let record =
            Record { label: Some("two\nlines \"quoted\""), grant: Some(7), ..Record::new(Event::Granted) };
        lines.write(&record);
        lines.write(&record);
        let text = std::fs::read_to_string(file.path()).unwrap();
        assert_eq!(text.lines().count(), 2);
        for line in text.lines() {
            let line: serde_json::Value = serde_json::from_str(line).unwrap();
            assert_eq!((&line["event"], &line["grant"]), (&"granted".into(), &7.into()));
            assert_eq!(line["label"], "two\nlines \"quoted\"");
            let time = line["time"].as_str().unwrap();
            assert!(time.len() >= 20 && time.ends_with('Z') && time.as_bytes()[10] == b'T', "{time}");
            assert!(line.get("view").is_none());
        }
    }

    #[test]
    fn a_full_disk_is_survived() {
        let full = AuditFile::open(Path::new("/dev/full")).unwrap();
        let mut lines = Lines::new(full);
        for _ in 0..3 {
            lines.write(&Record::new(Event::Gone));
        }
        assert!(lines.is_told && lines.is_broken);
    }
}
