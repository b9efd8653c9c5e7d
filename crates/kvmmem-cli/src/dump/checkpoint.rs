// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file beside an unfinished dump with its progress.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use kvmmem::view::{Status, View};
use kvmmem_client::admin::VcpuRegisters;
use kvmmem_linux::{Find, FindError, Kernel};
use serde::{Deserialize, Serialize};
use uuid::Uuid;

use super::layout::Format;
use super::notes::Notes;
use crate::range::{GpaRange, shown};

const VERSION: u32 = 2;

/// What to do where a dump cannot be resumed.
pub(super) const REMEDY: &str = "remove it and its .part, and begin again";

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
            started_ms: now_ms(),
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

    /// Checks that a dump to `file` in this format, of a target with this status, can continue from
    /// here.
    pub(super) fn check(
        &self,
        file: &Path,
        format: Format,
        status: &Status,
        instance: Option<u64>,
        reached: &[GpaRange],
    ) -> Result<()> {
        let file = file.display();
        let uuid = Uuid::from_bytes(status.uuid);
        ensure!(
            self.uuid == uuid,
            "{file} is a dump of another target, {}, and the token is for {uuid}: get a token for that one",
            self.uuid
        );
        ensure!(
            self.instance.is_some() && instance.is_some(),
            "this machine's driver or its host is older than {file}.part and does not say whether the target was \
             started again since: {REMEDY}"
        );
        ensure!(
            !self.is_stale && self.instance == instance,
            "the target was reset, resized or started again since {file} was begun: {REMEDY}"
        );
        ensure!(
            self.format == format,
            "{file} was begun in another format: give the same --format, or {REMEDY}"
        );
        ensure!(
            self.ranges == reached,
            "{file} was begun with other ranges, {}: give the same ones by a token that reaches them, or {REMEDY}",
            shown(&self.ranges)
        );
        Ok(())
    }

    /// Adds what is found of the kernel that runs in the target.
    pub(super) fn put_kernel(&mut self, view: &View, is_live: bool) -> Result<()> {
        let cr3 = self.vcpus.first().map(|vcpu| vcpu.cr3);
        match Kernel::find(view, Find { is_live, cr3, ..Find::default() }) {
            Ok(kernel) => {
                let note = kernel.note();
                self.vmcoreinfo = note.gpa.map(|gpa| (gpa, note.text().to_owned()));
                self.direct_map = kernel.direct_map();
            }
            Err(FindError::Memory(error)) => return Err(error.into()),
            Err(FindError::NoKernel) => {}
            Err(error) => tracing::warn!("{error}; the file has no VMCOREINFO note"),
        }
        Ok(())
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

/// Milliseconds since the epoch.
pub(super) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
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
