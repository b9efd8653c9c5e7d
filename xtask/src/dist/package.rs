// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A Debian package: its files in a folder, its control files, and dpkg-deb. The same content gives
//! the same bytes.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use super::Release;
use super::contents::{self, Package};
use crate::binaries::Binaries;
use crate::cache::Cache;
use crate::project;
use crate::tool::Tool;

/// Who answers for the packages.
const MAINTAINER: &str = "kvmmem authors <kvmmem@users.noreply.github.com>";

/// Scripts that dpkg runs, as far as a package has them.
const SCRIPTS: [&str; 3] = ["postinst", "prerm", "postrm"];

/// The files of a package, in a folder that is the system's root.
#[derive(Debug)]
pub(crate) struct Stage {
    folder: TempDir,
    log: PathBuf,
}

impl Package {
    /// Makes the package in `folder`; returns its path.
    pub(super) fn build(
        &self,
        cache: &Cache,
        release: &Release,
        binaries: &Binaries,
        folder: &Path,
        log: &Path,
    ) -> Result<PathBuf> {
        let make = || {
            let stage = Stage { folder: cache.scratch()?, log: log.to_owned() };
            set_mode(stage.folder.path(), 0o755)?;
            for (from, to, mode) in self.files {
                stage.copy(&project::root().join(from), to, *mode)?;
            }
            (self.fill)(&stage, release, binaries)?;
            self.document(&stage, release)?;
            self.control(&stage, release)?;
            let file =
                folder.join(format!("{}_{}_{}.deb", self.name, release.full(), self.architecture));
            // One thread, as the number of threads can show in the bytes.
            Tool::new("dpkg-deb", log)
                .args(["--root-owner-group", "-Zxz", "--threads-max=1", "--build"])
                .arg(stage.folder.path())
                .arg(&file)
                .env(super::EPOCH, &release.epoch)
                .run()?;
            Ok::<_, anyhow::Error>(file)
        };
        make().with_context(|| format!("cannot make the package {}", self.name))
    }

    /// What Debian wants in each package's documentation.
    fn document(&self, stage: &Stage, release: &Release) -> Result<()> {
        let folder = format!("usr/share/doc/{}", self.name);
        stage.write(
            &format!("{folder}/copyright"),
            contents::copyright(release)?.as_bytes(),
            0o644,
        )?;
        let change = format!(
            "{} ({}) unstable; urgency=medium\n\n  * Packages of kvmmem {}; its own changes are in changelog.gz.\n\n \
             -- {MAINTAINER}  {}\n",
            self.name,
            release.full(),
            release.version,
            release.date,
        );
        stage.compress(&format!("{folder}/changelog.Debian"), change.as_bytes())?;
        stage.compress(
            &format!("{folder}/changelog"),
            &fs::read(project::root().join("CHANGELOG.md"))?,
        )?;
        let overrides = self.own("lintian-overrides");
        if overrides.exists() {
            stage.copy(&overrides, &format!("usr/share/lintian/overrides/{}", self.name), 0o644)?;
        }
        Ok(())
    }

    /// Writes `DEBIAN/`.
    fn control(&self, stage: &Stage, release: &Release) -> Result<()> {
        let files = stage.files()?;
        let sums = Tool::new("md5sum", &stage.log)
            .arg("--")
            .args(&files)
            .dir(stage.folder.path())
            .output()?;
        let size = stage.size(&files)?;
        let mut control = format!(
            "Package: {}\nSource: kvmmem\nVersion: {}\nArchitecture: {}\nMaintainer: {MAINTAINER}\n\
             Installed-Size: {size}\nSection: {}\nPriority: optional\nHomepage: {}\n",
            self.name,
            release.full(),
            self.architecture,
            self.section,
            release.repository,
        );
        for (field, value) in self.relations {
            control.push_str(&format!("{field}: {value}\n"));
        }
        control.push_str(&format!("Description: {}\n", self.summary));
        for line in self.description.lines() {
            control.push_str(&format!(" {line}\n"));
        }
        stage.write("DEBIAN/control", control.as_bytes(), 0o644)?;
        stage.write("DEBIAN/md5sums", sums.as_bytes(), 0o644)?;
        let conffiles: String = files
            .iter()
            .filter(|file| file.starts_with("etc"))
            .map(|file| format!("/{}\n", file.display()))
            .collect();
        if !conffiles.is_empty() {
            stage.write("DEBIAN/conffiles", conffiles.as_bytes(), 0o644)?;
        }
        for script in SCRIPTS.iter().filter(|script| self.own(script).exists()) {
            let text = contents::fill_in(&fs::read_to_string(self.own(script))?, release);
            stage.write(&format!("DEBIAN/{script}"), text.as_bytes(), 0o755)?;
        }
        Ok(())
    }

    /// A file that the package has for itself.
    fn own(&self, name: &str) -> PathBuf {
        project::root().join("packaging").join(self.name).join(name)
    }
}

impl Stage {
    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// Where a file is to be, its folder made. `to` is relative to the system's root.
    pub(crate) fn place(&self, to: &str) -> Result<PathBuf> {
        let path = self.folder.path().join(to);
        let parents: Vec<_> =
            Path::new(to).ancestors().skip(1).filter(|one| *one != Path::new("")).collect();
        for parent in parents.into_iter().rev() {
            let parent = self.folder.path().join(parent);
            if !parent.exists() {
                fs::create_dir(&parent).with_context(|| parent.display().to_string())?;
                set_mode(&parent, 0o755)?;
            }
        }
        Ok(path)
    }

    pub(crate) fn copy(&self, from: &Path, to: &str, mode: u32) -> Result<()> {
        let bytes = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.write(to, &bytes, mode)
    }

    pub(crate) fn write(&self, to: &str, bytes: &[u8], mode: u32) -> Result<()> {
        let path = self.place(to)?;
        fs::write(&path, bytes).with_context(|| format!("cannot write {}", path.display()))?;
        set_mode(&path, mode)
    }

    /// Writes `to` with `.gz` added, without name and time inside.
    pub(crate) fn compress(&self, to: &str, bytes: &[u8]) -> Result<()> {
        self.write(to, bytes, 0o644)?;
        Tool::new("gzip", &self.log).args(["-9n", to]).dir(self.folder.path()).run()
    }

    /// All files but dpkg's own, relative, sorted.
    fn files(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        let mut folders = vec![PathBuf::new()];
        while let Some(folder) = folders.pop() {
            for entry in fs::read_dir(self.folder.path().join(&folder))? {
                let entry = entry?;
                let path = folder.join(entry.file_name());
                if !entry.file_type()?.is_dir() {
                    files.push(path);
                } else if path != Path::new("DEBIAN") {
                    folders.push(path);
                }
            }
        }
        files.sort();
        Ok(files)
    }

    /// What they take when they are installed, KiB.
    fn size(&self, files: &[PathBuf]) -> Result<u64> {
        files.iter().try_fold(0, |sum, file| {
            Ok(sum + fs::symlink_metadata(self.folder.path().join(file))?.len().div_ceil(1024))
        })
    }
}

fn set_mode(path: &Path, mode: u32) -> Result<()> {
    fs::set_permissions(path, Permissions::from_mode(mode))
        .with_context(|| path.display().to_string())
}
