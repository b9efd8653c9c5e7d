// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The record that `kvmmem dump` writes beside a dump, `FILE.json`: of a raw file it says where
//! there is RAM. While the dump is not finished, `FILE.part` is there instead.

use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::error::DumpError;
use super::file;
use super::segment::{MAX_SEGMENTS, Segment};
use crate::range::Range;

/// The longest record, bytes.
const MAX_LEN: u64 = 16 << 20;

#[derive(Deserialize)]
struct Record {
    format: String,
    ranges: Vec<Line>,
}

#[derive(Deserialize)]
struct Line {
    /// In hex, with 0x.
    gpa: String,
    len: u64,
}

/// The memory of the raw dump at `path`, if there is a record beside it.
pub(super) fn segments(path: &Path) -> Result<Option<Vec<Segment>>, DumpError> {
    let (part, record) = (beside(path, ".part"), self::path(path));
    if part.exists() {
        return Err(DumpError::Unfinished { path: path.to_owned(), part });
    }
    let file = match file::open(&record) {
        Ok((file, _)) => file,
        Err(DumpError::Open { source, .. }) if source.kind() == ErrorKind::NotFound => {
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let mut text = String::new();
    let read = file.take(MAX_LEN).read_to_string(&mut text);
    read.map_err(|source| DumpError::read(&record, 0, source))?;
    let malformed =
        || DumpError::malformed(&record, "it is not the record of a dump; move it elsewhere");
    let record: Record = serde_json::from_str(&text).map_err(|_| malformed())?;
    if record.format != "raw" || record.ranges.len() > MAX_SEGMENTS {
        return Err(malformed());
    }
    let segment = |line: &Line| {
        let gpa = u64::from_str_radix(line.gpa.strip_prefix("0x")?, 16).ok()?;
        Some(Segment { range: Range { gpa, len: line.len }, offset: gpa })
    };
    let segments: Option<Vec<Segment>> = record.ranges.iter().map(segment).collect();
    segments.map(Some).ok_or_else(malformed)
}

/// Where the record of the dump at `path` would be.
pub(super) fn path(path: &Path) -> PathBuf {
    beside(path, ".json")
}

fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    name.into()
}
