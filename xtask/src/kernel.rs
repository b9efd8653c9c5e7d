// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Debian's kernel in the build root: the stock image and modules, and the source prepared for
//! building against.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::cache::Cache;
use crate::release::{self, Release};
use crate::root::{self, Root};
use crate::ui;

/// Our folder inside the root.
const FOLDER: &str = "/kvmmem";

/// Packages that the kernel's build needs as new as the kernel.
const TOOLS: [&str; 2] = ["libelf-dev", "libdw-dev"];

/// A prepared kernel.
#[derive(Debug)]
pub(crate) struct Kernel {
    record: Record,
    root: Root,
}

/// A kernel's source, prepared for building modules against.
pub(crate) struct BuildTree<'a> {
    pub(crate) root: &'a Root,
    /// Inside the root.
    pub(crate) path: &'a str,
    /// Names the kernel and its configuration.
    pub(crate) version: &'a str,
    /// Variables of make.
    pub(crate) variables: &'a [&'a str],
}

/// Written last: a kernel without it is not complete.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    release: String,
    version: String,
    source: String,
}

impl Kernel {
    /// Whether the build root has it already.
    pub(crate) fn is_prepared(cache: &Cache) -> bool {
        Root::folder(cache).join(FOLDER.trim_start_matches('/')).join("kernel.json").exists()
    }

    /// The kernel in `root`, prepared if it is not there. The cache must be locked.
    pub(crate) fn make(cache: &Cache, root: Root) -> Result<Self> {
        let path = root.path(&format!("{FOLDER}/kernel.json"));
        if let Ok(bytes) = fs::read(&path) {
            let record =
                serde_json::from_slice(&bytes).with_context(|| path.display().to_string())?;
            return Ok(Self { record, root });
        }
        let log = cache.fresh_log("kernel")?;
        root::remove(&root.path(FOLDER), &log)?;
        let release = ui::step("kernel: which is the newest that fits", || resolve(&root, &log))?;
        let record = Record {
            source: format!("{FOLDER}/{}", release.source()),
            version: release.version.clone(),
            release: release.name.clone(),
        };
        let kernel = Self { record, root };
        ui::step(&format!("kernel: packages of {}", release.name), || {
            kernel.install(&release, &log)
        })?;
        ui::step("kernel: source prepared for modules in Rust", || kernel.prepare(&release, &log))?;
        let temporary = cache.folder().join("partial-kernel.json");
        fs::write(&temporary, serde_json::to_vec(&kernel.record)?)?;
        crate::tool::Tool::as_root("mv", &log).arg(&temporary).arg(&path).run()?;
        Ok(kernel)
    }

    pub(crate) fn release(&self) -> &str {
        &self.record.release
    }

    pub(crate) fn version(&self) -> &str {
        &self.record.version
    }

    pub(crate) fn root(&self) -> &Root {
        &self.root
    }

    /// The prepared source, as seen inside the root.
    pub(crate) fn source(&self) -> &str {
        &self.record.source
    }

    pub(crate) fn build_tree(&self) -> BuildTree<'_> {
        BuildTree { root: &self.root, path: self.source(), version: self.version(), variables: &[] }
    }

    /// The stock image.
    pub(crate) fn image(&self) -> PathBuf {
        self.modules().join("vmlinuz")
    }

    /// `lib/modules/RELEASE` of the stock kernel.
    pub(crate) fn modules(&self) -> PathBuf {
        self.root.path(&format!("{FOLDER}/image/usr/lib/modules/{}", self.record.release))
    }

    fn install(&self, release: &Release, log: &Path) -> Result<()> {
        let apt = || self.root.tool("apt-get", log).args(["-q", "-y", "--no-install-recommends"]);
        apt()
            .args(["-t", root::BACKPORTS, "install"])
            .args([exactly(&release.source(), release), exactly(&release.headers(), release)])
            .args(TOOLS)
            .run()?;
        // The image is not installed, only unpacked: its scripts would make an initramfs that is
        // not used. The modules are stored plain, as the test VMs load them.
        let images = release.images().map(|image| exactly(&image, release)).join(" ");
        let unpack = format!(
            "set -e; mkdir -p {FOLDER}/packages {FOLDER}/image; cd {FOLDER}/packages; \
             apt-get download -q {images}; for package in *.deb; do dpkg-deb -x \"$package\" ../image; done; \
             cd {FOLDER}; rm -r packages; find image -name '*.ko.xz' -exec unxz {{}} +; \
             depmod -b {FOLDER}/image/usr {}; apt-get clean",
            release.name
        );
        self.root.tool("sh", log).args(["-c", &unpack]).run()?;
        if !self.image().is_file() {
            bail!("the kernel's packages hold no {}", self.image().display());
        }
        Ok(())
    }

    fn prepare(&self, release: &Release, log: &Path) -> Result<()> {
        let source = self.source();
        let (archive, headers) = (release.source(), release.headers());
        let unpack = format!(
            "set -e; cd {FOLDER}; tar xf /usr/src/{archive}.tar.xz; cp /usr/src/{headers}/.config {source}/"
        );
        self.root.tool("sh", log).args(["-c", &unpack]).run()?;
        let make = || self.root.tool("make", log).args(["-C", source]);
        let version = make().args(["-s", "kernelversion"]).output()?;
        // The release must be the image's own, or the image refuses the module.
        let local = format!("LOCALVERSION={}", release.local_version(version.trim())?);
        make().args(["olddefconfig"]).run()?;
        let jobs = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        make().arg(format!("-j{jobs}")).args([&local, "modules_prepare"]).run()?;
        let symbols = format!("/usr/src/{headers}/Module.symvers");
        self.root.tool("cp", log).args([&symbols, source]).run()?;
        let built =
            fs::read_to_string(self.root.path(&format!("{source}/include/config/kernel.release")))
                .context("the prepared source names no release")?;
        if built.trim() != release.name {
            bail!(
                "the prepared source is of release {}, the image of {}",
                built.trim(),
                release.name
            );
        }
        Ok(())
    }
}

fn exactly(package: &str, release: &Release) -> String {
    format!("{package}={}", release.version)
}

fn resolve(root: &Root, log: &Path) -> Result<Release> {
    root.tool("apt-get", log).args(["-q", "update"]).run()?;
    let pattern = "^linux-(source|headers|binary|modules)-[0-9]";
    let names = root.tool("apt-cache", log).args(["search", "--names-only", pattern]).output()?;
    let names: Vec<_> = names.lines().filter_map(|line| line.split(' ').next()).collect();
    if names.is_empty() {
        bail!("the mirror lists no kernel packages");
    }
    let stanzas = root.tool("apt-cache", log).arg("show").args(names).output()?;
    release::newest(&release::parse(&stanzas))
}
