// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file beside an unfinished dump with its progress.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use kvmmem_client::admin::VcpuRegisters;
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::elf::Notes;
use super::layout::Format;
use super::record;
use crate::range::GpaRange;

const VERSION: u32 = 2;

/// How far a dump is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Checkpoint {
    version: u32,
    /// The target.
    pub(super) uuid: Uuid,
    /// The run of the target ([`kvmmem::View::instance`]), if it is known: another run has other
    /// memory.
    pub(super) instance: Option<u64>,
    pub(super) format: Format,
    /// What is dumped, ascending.
    pub(super) ranges: Vec<GpaRange>,
    /// All below this address is in the file.
    pub(super) next: u64,
    /// Bytes of data that are in the file.
    pub(super) data_bytes: u64,
    /// What could not be read, ascending.
    pub(super) unreadable: Vec<GpaRange>,
    /// When the dump began, milliseconds since the epoch.
    pub(super) started_ms: u64,
    /// The kernel's note in the file, and where it was.
    pub(super) vmcoreinfo: Option<(u64, String)>,
    /// The vCPUs' registers in the file.
    #[serde(default)]
    pub(super) vcpus: Vec<VcpuRegisters>,
    /// Why there are none.
    #[serde(default)]
    pub(super) no_vcpus: Option<String>,
    /// Where the kernel has all physical memory.
    #[serde(default)]
    pub(super) direct_map: Option<u64>,
    /// The target was reset or resized in the middle.
    pub(super) is_stale: bool,
}

impl Checkpoint {
    pub(super) fn new(
        uuid: Uuid,
        instance: Option<u64>,
        format: Format,
        ranges: Vec<GpaRange>,
    ) -> Self {
        Self {
            version: VERSION,
            uuid,
            instance,
            format,
            ranges,
            next: 0,
            data_bytes: 0,
            unreadable: Vec::new(),
            started_ms: record::now_ms(),
            vmcoreinfo: None,
            vcpus: Vec::new(),
            no_vcpus: None,
            direct_map: None,
            is_stale: false,
        }
    }

    /// Notes of an ELF core.
    pub(super) fn notes(&self) -> Notes<'_> {
        let vmcoreinfo = self.vmcoreinfo.as_ref().map(|(_, text)| text.as_str());
        Notes { vcpus: &self.vcpus, vmcoreinfo, direct_map: self.direct_map }
    }

    /// What of the ranges is not in the file yet.
    pub(super) fn left(&self) -> Vec<GpaRange> {
        let left = self.ranges.iter().map(|range| range.start.max(self.next)..range.end);
        left.filter(|range| !range.is_empty()).collect()
    }

    /// Reads the file beside `dump`; `None` if there is no such file.
    pub(super) fn load(dump: &Path) -> Result<Option<Self>> {
        let path = path(dump);
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => {
                return Err(error).with_context(|| format!("cannot read {}", path.display()));
            }
        };
        let remedy = || {
            format!(
                "{} does not tell how far the dump is: remove it and the dump, and begin again",
                path.display()
            )
        };
        let checkpoint: Self = serde_json::from_str(&text).with_context(remedy)?;
        let ascends = checkpoint
            .ranges
            .iter()
            .zip(checkpoint.ranges.iter().skip(1))
            .all(|(a, b)| a.end <= b.start);
        let is_whole = checkpoint.version == VERSION
            && ascends
            && checkpoint.ranges.iter().all(|range| range.start < range.end);
        ensure!(is_whole, remedy());
        Ok(Some(checkpoint))
    }

    /// Writes the file beside `dump`: after this returns, that or, where it fails, the state before
    /// is on disk.
    pub(super) fn save(&self, dump: &Path) -> Result<()> {
        replace(&path(dump), &serde_json::to_vec(self)?)
    }

    /// Removes the file beside `dump`, which is complete.
    pub(super) fn remove(dump: &Path) -> Result<()> {
        let path = path(dump);
        fs::remove_file(&path).with_context(|| format!("cannot remove {}", path.display()))
    }
}

/// Puts a file with these bytes at `path`: after this returns, that or, where it fails, what was
/// there before is on disk.
pub(super) fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    let new = PathBuf::from(new);
    let write = || {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&new)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)
    };
    write()
        .inspect_err(|_| {
            // Where the disk is full, it need not be kept full.
            let _ = fs::remove_file(&new);
        })
        .with_context(|| format!("cannot write {}", path.display()))
}

/// Where the state of `dump` is kept.
pub(super) fn path(dump: &Path) -> PathBuf {
    let mut path = dump.as_os_str().to_owned();
    path.push(".part");
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_saved_is_loaded() {
        let directory = tempfile::tempdir().unwrap();
        let dump = directory.path().join("core");
        assert_eq!(Checkpoint::load(&dump).unwrap(), None);
        let mut checkpoint = Checkpoint::new(
            Uuid::from_u128(7),
            Some(4),
            Format::Elf,
            vec![0..0x1000, 0x2000..0x3000],
        );
        checkpoint.next = 0x2000;
        checkpoint.save(&dump).unwrap();
        assert_eq!(Checkpoint::load(&dump).unwrap(), Some(checkpoint));
        assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 1);
        Checkpoint::remove(&dump).unwrap();
        assert_eq!(Checkpoint::load(&dump).unwrap(), None);
    }

    #[test]
    fn nonsense_is_refused_with_the_remedy() {
        let directory = tempfile::tempdir().unwrap();
        let dump = directory.path().join("core");
        let good = Checkpoint::new(Uuid::nil(), None, Format::Raw, vec![0..0x1000, 0x1000..0x2000]);
        let bad = [
            String::new(),
            "{}".to_owned(),
            serde_json::to_string(&Checkpoint { version: 1, ..good.clone() }).unwrap(),
            serde_json::to_string(&Checkpoint {
                ranges: vec![0..0x1000, 0x1000..0x1000],
                ..good.clone()
            })
            .unwrap(),
            serde_json::to_string(&Checkpoint { ranges: vec![0x1000..0x2000, 0..0x1000], ..good })
                .unwrap(),
        ];
        for text in bad {
            fs::write(path(&dump), &text).unwrap();
            let error = Checkpoint::load(&dump).unwrap_err().to_string();
            assert!(
                error.contains("core.part") && error.contains("begin again"),
                "{text}: {error}"
            );
        }
    }
}
