// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Per-user cache, outside of the checkout, of everything that the test bed makes.

use std::fs::{self, File, OpenOptions};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result, bail};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;
use tempfile::TempDir;

use crate::ui;

/// How long the rests of runs and modules of other sources are kept.
const KEPT: Duration = Duration::from_secs(7 * 24 * 3600);

/// The cache's folder.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    folder: PathBuf,
}

/// Held while anything in the cache is made or removed; other runs wait.
#[derive(Debug)]
pub(crate) struct Lock {
    _file: File,
}

impl Cache {
    /// `KVMMEM_CACHE`, else `kvmmem` in `XDG_CACHE_HOME` or `~/.cache`.
    pub(crate) fn open() -> Result<Self> {
        let variable =
            |name| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
        let folder = variable("KVMMEM_CACHE")
            .or_else(|| variable("XDG_CACHE_HOME").map(|cache| cache.join("kvmmem")))
            .or_else(|| variable("HOME").map(|home| home.join(".cache/kvmmem")))
            .context("no place for the cache: set KVMMEM_CACHE")?;
        if !folder.is_absolute() {
            bail!("the cache's path must be absolute: {}", folder.display());
        }
        fs::create_dir_all(folder.join("logs"))
            .with_context(|| format!("cannot make the cache {}", folder.display()))?;
        Ok(Self { folder })
    }

    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }

    /// The log of a step.
    pub(crate) fn log(&self, step: &str) -> PathBuf {
        self.folder.join("logs").join(format!("{step}.log"))
    }

    /// An empty log of a step: what an earlier run wrote is dropped.
    pub(crate) fn fresh_log(&self, step: &str) -> Result<PathBuf> {
        let log = self.log(step);
        File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        Ok(log)
    }

    /// Waits until no other run makes or removes anything.
    pub(crate) fn lock(&self) -> Result<Lock> {
        let path = self.folder.join("lock");
        let file = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(&path)
            .with_context(|| format!("cannot open {}", path.display()))?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {
                self.prune();
                return Ok(Lock { _file: file });
            }
            Err(Errno::WOULDBLOCK) => ui::say("  waiting for another run that uses the cache ..."),
            Err(error) => return Err(error).context("cannot lock the cache"),
        }
        flock(&file, FlockOperation::LockExclusive).context("cannot lock the cache")?;
        Ok(Lock { _file: file })
    }

    /// Removes leftovers of killed runs and old logs and modules.
    fn prune(&self) {
        let old = |path: &Path| {
            let age =
                fs::metadata(path).and_then(|data| data.modified()).map(|time| time.elapsed());
            matches!(age, Ok(Ok(age)) if age > KEPT)
        };
        for folder in [&self.folder, &self.folder.join("logs")] {
            for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
                let name = entry.file_name();
                let name = name.to_string_lossy();
                // What cannot be removed is tried again by the next run.
                if name.starts_with("run-") && old(&entry.path()) {
                    let _ = fs::remove_dir_all(entry.path());
                } else if (name.starts_with("console-") || name.ends_with(".ko"))
                    && old(&entry.path())
                {
                    let _ = fs::remove_file(entry.path());
                }
            }
        }
    }

    /// A folder for one run, removed when it is dropped.
    pub(crate) fn scratch(&self) -> Result<TempDir> {
        tempfile::Builder::new()
            .prefix("run-")
            .tempdir_in(&self.folder)
            .context("cannot make a folder in the cache")
    }

    /// Writes a file that is there whole or not at all.
    pub(crate) fn write(&self, path: &Path, bytes: &[u8]) -> Result<()> {
        let write = || {
            let mut file = tempfile::NamedTempFile::new_in(&self.folder)?;
            std::io::Write::write_all(&mut file, bytes)?;
            file.persist(path)?;
            Ok::<_, std::io::Error>(())
        };
        write().with_context(|| format!("cannot write {}", path.display()))
    }
}

/// A short key for content; equal content has equal keys.
#[derive(Default)]
pub(crate) struct Key(DefaultHasher);

impl Key {
    pub(crate) fn add(&mut self, content: impl AsRef<[u8]>) {
        content.as_ref().hash(&mut self.0);
    }

    /// 16 hexadecimal digits.
    pub(crate) fn finish(&self) -> String {
        format!("{:016x}", self.0.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::Key;

    #[test]
    fn the_key_tells_how_content_is_split() {
        let key = |parts: &[&str]| {
            let mut key = Key::default();
            parts.iter().for_each(|part| key.add(part));
            key.finish()
        };
        assert_eq!(key(&["ab", "c"]), key(&["ab", "c"]));
        assert_ne!(key(&["ab", "c"]), key(&["a", "bc"]));
    }
}
