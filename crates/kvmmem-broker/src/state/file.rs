// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The file of what is remembered: one JSON object, replaced as a whole.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, RenameFlags, renameat_with};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::entry::Entry;

/// Its name.
const NAME: &str = "added.json";

/// What it is written as before it takes the place of the old one.
const NEW: &str = "added.json.new";

/// What one is renamed to that is not read, with a number.
const UNREAD: &str = "added.json.unread-";

/// The most of those.
const MAX_UNREAD: u32 = 64;

/// The version of its format. What has another one is not read.
const VERSION: u32 = 1;

/// The largest that is read, bytes: 2,048 VMs take less than 2 MiB.
const MAX_SIZE: u64 = 16 << 20;

/// Another number each time that the host starts.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// Where it is.
#[derive(Debug)]
pub(super) struct StateFile {
    path: PathBuf,
    new: PathBuf,
    boot: String,
    is_told: bool,
}

/// What comes first, in every version.
#[derive(Deserialize)]
struct Header {
    version: u32,
}

#[derive(Serialize, Deserialize)]
struct Content<V> {
    version: u32,
    /// Process ids and times mean nothing after the host has started again.
    boot: String,
    vms: V,
}

/// Why what is there is not read.
#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("it cannot be read")]
    Io(#[from] io::Error),
    #[error("it has more than {MAX_SIZE:#x} bytes")]
    TooLong,
    #[error("it is not what a broker writes")]
    Malformed(#[from] serde_json::Error),
    #[error("its version is {0}, expected {VERSION}")]
    Version(u32),
}

/// A file that cannot be read now and may be readable later. It stays where it is.
#[derive(Debug, thiserror::Error)]
#[error(
    "cannot read {path}; start the broker once it can be read, or move it away and add the VMs again"
)]
struct Unreadable {
    path: PathBuf,
    source: io::Error,
}

impl StateFile {
    /// The file in a folder, and what it says of VMs that may still run. Where it makes no sense it
    /// is renamed, so that nothing is lost; the log tells, and it says nothing.
    ///
    /// # Errors
    /// Where the folder cannot be made or written to, the file cannot be read, or there are
    /// [`MAX_UNREAD`] of those.
    pub(super) fn open(directory: &Path) -> io::Result<(Self, Vec<Entry>)> {
        DirBuilder::new().recursive(true).mode(0o700).create(directory)?;
        let boot = std::fs::read_to_string(BOOT_ID)?.trim().to_owned();
        let (path, new) = (directory.join(NAME), directory.join(NEW));
        let file = Self { path, new, boot, is_told: false };
        let entries = match file.read() {
            Ok(content) if content.boot == file.boot => content.vms,
            Ok(content) if content.vms.is_empty() => Vec::new(),
            Ok(content) => {
                tracing::info!(
                    vms = content.vms.len(),
                    "the host was started anew; the VMs that were added are gone"
                );
                Vec::new()
            }
            Err(ReadError::Io(error)) if error.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(ReadError::Io(source)) if source.kind() != io::ErrorKind::IsADirectory => {
                return Err(io::Error::new(source.kind(), Unreadable { path: file.path, source }));
            }
            Err(error) => {
                let kept = set_aside(directory, &file.path)?;
                let (path, kept) = (file.path.display(), kept.display());
                let error = &error as &dyn std::error::Error;
                tracing::warn!(
                    %path,
                    %kept,
                    error,
                    "the VMs that were added are not known any more: add them again; or stop the broker, move \
                     the file back and start a broker that reads it"
                );
                Vec::new()
            }
        };
        file.replace(entries.iter())?;
        Ok((file, entries))
    }

    /// Replaces what is there. A failure is told once: the broker does without.
    pub(super) fn write<'e>(&mut self, entries: impl Iterator<Item = &'e Entry>) {
        if let Err(error) = self.replace(entries)
            && !std::mem::replace(&mut self.is_told, true)
        {
            tracing::error!(path = %self.path.display(), %error, "cannot remember the VMs that were added");
        }
    }

    fn read(&self) -> Result<Content<Vec<Entry>>, ReadError> {
        let mut bytes = Vec::new();
        File::open(&self.path)?.take(MAX_SIZE + 1).read_to_end(&mut bytes)?;
        if bytes.len() as u64 > MAX_SIZE {
            return Err(ReadError::TooLong);
        }
        let Header { version } = serde_json::from_slice(&bytes)?;
        if version != VERSION {
            return Err(ReadError::Version(version));
        }
        Ok(serde_json::from_slice(&bytes)?)
    }

    /// A reader finds the old file or the new one. There is no `fsync`: a host that loses power
    /// loses its VMs too.
    fn replace<'e>(&self, entries: impl Iterator<Item = &'e Entry>) -> io::Result<()> {
        let vms: Vec<&Entry> = entries.collect();
        let content = Content { version: VERSION, boot: self.boot.clone(), vms };
        let mut options = OpenOptions::new();
        let mut file =
            options.create(true).truncate(true).write(true).mode(0o600).open(&self.new)?;
        file.write_all(&serde_json::to_vec(&content)?)?;
        std::fs::rename(&self.new, &self.path)
    }
}

/// Renames a file that is not read; returns what it is called then.
fn set_aside(directory: &Path, path: &Path) -> io::Result<PathBuf> {
    for number in 1..=MAX_UNREAD {
        let kept = directory.join(format!("{UNREAD}{number}"));
        match renameat_with(CWD, path, CWD, &kept, RenameFlags::NOREPLACE) {
            Err(Errno::EXIST) => {}
            renamed => return Ok(renamed.map(|()| kept)?),
        }
    }
    let directory = directory.display();
    Err(io::Error::other(format!(
        "{directory}/{NAME} cannot be read, and there are {MAX_UNREAD} files {UNREAD}N already; remove them"
    )))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use kvmmem_proto::message::OnSilence;
    use proptest::prelude::*;
    use uuid::Uuid;

    use super::super::entry::Role;
    use super::*;

    fn entries() -> Vec<Entry> {
        let target = Entry {
            name: "web1".into(),
            uuid: Uuid::from_u128(7),
            pid: 4711,
            started: 99,
            qmp: Some("/run/web1.qmp".into()),
            generation: 8,
            role: Role::Target { files: vec![] },
        };
        let role = Role::Introspector { cid: 7, on_silence: OnSilence::Kill, trusted: true };
        vec![target.clone(), Entry { qmp: None, role, ..target }]
    }

    #[test]
    fn what_is_written_is_read_again() {
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("state");
        let (mut file, none) = StateFile::open(&inner).unwrap();
        assert_eq!(none, []);
        file.write(entries().iter());
        assert_eq!(StateFile::open(&inner).unwrap().1, entries());
        let mode = std::fs::metadata(inner.join(NAME)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(!inner.join(NEW).exists());
    }

    #[test]
    fn what_an_earlier_boot_left_is_forgotten() {
        let directory = tempfile::tempdir().unwrap();
        let (file, _) = StateFile::open(directory.path()).unwrap();
        StateFile { boot: "another".into(), ..file }.write(entries().iter());
        assert_eq!(StateFile::open(directory.path()).unwrap().1, []);
    }

    #[test]
    fn what_makes_no_sense_is_nothing_and_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join(NAME);
        let kept = |number: usize| directory.path().join(format!("{UNREAD}{number}"));
        let too_long = vec![b' '; usize::try_from(MAX_SIZE).unwrap() + 1];
        let all: [&[u8]; 8] = [
            b"",
            b"{",
            b"[]",
            b"{\"version\":2,\"vms\":7}",
            b"{\"version\":1,\"boot\":\"\"}",
            b"\0",
            b"{\"version\":1,\"boot\":\"\xff\",\"vms\":[]}",
            &too_long,
        ];
        for (number, garbage) in (1..).zip(all) {
            std::fs::write(&path, garbage).unwrap();
            let (mut file, none) = StateFile::open(directory.path()).unwrap();
            assert_eq!(none, [], "{number}");
            assert!(std::fs::read(kept(number)).unwrap() == garbage, "{number}");
            file.write(entries().iter());
            assert_eq!(StateFile::open(directory.path()).unwrap().1, entries());
        }
        std::fs::remove_file(&path).unwrap();
        std::fs::create_dir(&path).unwrap();
        StateFile::open(directory.path()).unwrap();
        assert!(kept(all.len() + 1).is_dir() && path.is_file());
        assert!(StateFile::open(Path::new("/proc/nowhere")).is_err());
        // Their number is bounded, and what is not kept is not replaced.
        for number in 1..=MAX_UNREAD {
            std::fs::write(kept(number.try_into().unwrap()), "").ok();
        }
        std::fs::write(&path, "the last one").unwrap();
        let error = StateFile::open(directory.path()).unwrap_err().to_string();
        assert!(error.contains("added.json cannot be read"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "the last one");
    }

    /// Links to a file of which each read fails with EIO, and to itself (ELOOP).
    #[test]
    fn what_the_system_does_not_read_stays_and_fails_the_start() {
        for (target, reason) in [("/proc/self/mem", Errno::IO), (NAME, Errno::LOOP)] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join(NAME);
            std::os::unix::fs::symlink(target, &path).unwrap();
            let error = StateFile::open(directory.path()).unwrap_err();
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
            let source = std::error::Error::source(&error).unwrap().downcast_ref().unwrap();
            assert_eq!(Errno::from_io_error(source), Some(reason));
            assert_eq!(std::fs::read_link(&path).unwrap(), Path::new(target));
            assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        }
    }

    /// As the first broker that had this file wrote it.
    #[test]
    fn what_earlier_brokers_wrote_is_read() {
        let directory = tempfile::tempdir().unwrap();
        let boot = std::fs::read_to_string(BOOT_ID).unwrap();
        let vm = |role: &str| {
            format!(
                r#"{{"name":"web1","uuid":"00000000-0000-0000-0000-000000000007","pid":4711,"started":99,"qmp":null,"role":{role}}}"#
            )
        };
        let target = vm(r#"{"target":{"files":[{"device":1,"inode":2}]}}"#);
        let introspector = vm(r#"{"introspector":{"cid":7,"on_silence":"kill"}}"#);
        let text =
            format!(r#"{{"version":1,"boot":"{}","vms":[{target},{introspector}]}}"#, boot.trim());
        std::fs::write(directory.path().join(NAME), text).unwrap();
        let (_, read) = StateFile::open(directory.path()).unwrap();
        let roles: Vec<_> = read.iter().map(|entry| &entry.role).collect();
        let [
            Role::Target { files },
            Role::Introspector { cid: 7, on_silence: OnSilence::Kill, trusted: false },
        ] = &roles[..]
        else {
            panic!("{roles:?}")
        };
        assert_eq!((files.len(), read[0].generation), (1, 0));
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let directory = tempfile::tempdir().unwrap();
            std::fs::write(directory.path().join(NAME), bytes).unwrap();
            prop_assert_eq!(StateFile::open(directory.path()).unwrap().1, vec![]);
        }
    }
}
