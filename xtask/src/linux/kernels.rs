// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Debian's kernels for the guests of suite `linux`: their images and modules as packaged, in the
//! build root.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::cache::Cache;
use crate::root::{self, Root};
use crate::test_bed::TestBed;
use crate::tool::Tool;
use crate::{depends, mirror, ui};

/// Where they are inside the root.
const FOLDER: &str = "/kvmmem/linux";

/// Modules of a guest: for the disk that it writes to, and one that nothing needs.
pub(super) const MODULES: [&str; 4] = ["virtio_pci", "virtio_blk", "dummy", "overlay"];

/// A Debian release, and the newest kernel of its own. The sources are the mirror's parts and
/// suites.
struct Release {
    name: &'static str,
    sources: &'static [(&'static str, &'static str)],
}

/// Old releases have their updates only among those for security.
const RELEASES: [Release; 3] = [
    Release { name: "bullseye", sources: &[("", "bullseye"), ("-security", "bullseye-security")] },
    Release { name: "bookworm", sources: &[("", "bookworm")] },
    Release { name: "trixie", sources: &[("", "trixie")] },
];

/// The package that depends on a release's newest kernel.
const NEWEST: &str = "linux-image-cloud-amd64";

/// Where their debug information is inside the root.
const DEBUG_FOLDER: &str = "/kvmmem/linux-debug";

/// Reads the package lists of the sources `$2`, in `$1`.
const LISTS: &str = r#"
set -e
mkdir -p "$1/state/lists/partial" "$1/cache/archives/partial" "$1/image/usr/lib"
cd "$1"
printf '%s' "$2" > sources.list
touch status
apt() { program="$1"; shift; "$program" -q -o Dir::Etc::sourcelist="$PWD/sources.list" \
    -o Dir::Etc::sourceparts=/nonexistent -o Dir::State="$PWD/state" -o Dir::Cache="$PWD/cache" \
    -o Dir::State::status="$PWD/status" -o APT::Sandbox::User=root "$@"; }
apt apt-get update
"#;

/// Downloads the kernel that package `$3` depends on. Nothing is installed. Modules are stored
/// plain, in `usr/lib/modules` of every release.
const KERNEL: &str = r#"
package=$(apt apt-cache depends "$3" | sed -n 's/^ *Depends: \(linux-image-[0-9].*\)/\1/p' | head -n 1)
apt apt-get download "$package"
dpkg-deb -x ./*.deb image
[ ! -d image/lib/modules ] || mv image/lib/modules image/usr/lib/
release=$(ls image/usr/lib/modules)
find image -name '*.ko.xz' -exec unxz {} +
depmod -b "$PWD/image/usr" "$release"
cp "image/boot/vmlinuz-$release" "image/usr/lib/modules/$release/vmlinuz"
rm -r state cache sources.list status ./*.deb image/boot
"#;

/// Downloads the debug information of the kernel `$3`, and keeps that of the kernel without its
/// modules. tar stops reading there.
const DEBUG: &str = r#"
apt apt-get download "linux-image-$3-dbg"
dpkg-deb --fsys-tarfile ./*.deb | tar -xf - --occurrence=1 --strip-components=5 "./usr/lib/debug/boot/vmlinux-$3"
mv "vmlinux-$3" vmlinux
rm -r state cache sources.list status ./*.deb
"#;

/// A kernel to boot.
#[derive(Debug)]
pub(crate) struct Stock {
    /// As `uname -r` gives it.
    pub(crate) release: String,
    /// `lib/modules/RELEASE`, with the image as `vmlinuz`.
    folder: PathBuf,
}

impl Stock {
    /// The newest kernel of a Debian release, downloaded if it is not there, or the test bed's own
    /// by the name of "test bed".
    pub(crate) fn make(cache: &Cache, bed: &TestBed, name: &str, log: &Path) -> Result<Self> {
        if name == "bed" {
            let kernel = bed.kernel();
            return Ok(Self { release: kernel.release().to_owned(), folder: kernel.modules() });
        }
        let release = RELEASES.iter().find(|release| release.name == name);
        let release = release.with_context(|| format!("no Debian release is named {name}"))?;
        let root = bed.kernel().root();
        let folder = root.path(&format!("{FOLDER}/{name}"));
        let _lock = cache.lock()?;
        if !folder.exists() {
            let partial = format!("{FOLDER}/partial");
            root::remove(&root.path(&partial), log)?;
            let sources = release.sources()?;
            ui::step(&format!("linux: kernel of Debian {name}"), || {
                download(root, KERNEL, [&partial, &sources, NEWEST], log)
            })?;
            Tool::as_root("mv", log).arg(root.path(&partial)).arg(&folder).run()?;
        }
        let modules = folder.join("image/usr/lib/modules");
        let mut releases = fs::read_dir(&modules).with_context(|| modules.display().to_string())?;
        let entry =
            releases.next().with_context(|| format!("{} is empty", modules.display()))??;
        Ok(Self { release: entry.file_name().to_string_lossy().into_owned(), folder: entry.path() })
    }

    /// The image.
    pub(crate) fn image(&self) -> PathBuf {
        self.folder.join("vmlinuz")
    }

    /// The debug information of a Debian release's kernel (DWARF, some 350 MB); `None` where it is
    /// not there and is not to be downloaded.
    pub(crate) fn debug_information(
        &self,
        cache: &Cache,
        bed: &TestBed,
        name: &str,
        downloads: bool,
        log: &Path,
    ) -> Result<Option<PathBuf>> {
        let release = RELEASES.iter().find(|release| release.name == name);
        let release = release.with_context(|| format!("no Debian release is named {name}"))?;
        let root = bed.kernel().root();
        let folder = root.path(&format!("{DEBUG_FOLDER}/{}", self.release));
        let _lock = cache.lock()?;
        if !folder.exists() && downloads {
            let partial = format!("{DEBUG_FOLDER}/partial");
            root::remove(&root.path(&partial), log)?;
            let sources = release.sources()?;
            ui::step(&format!("linux: debug information of {}", self.release), || {
                download(root, DEBUG, [&partial, &sources, &self.release], log)
            })?;
            Tool::as_root("mv", log).arg(root.path(&partial)).arg(&folder).run()?;
        }
        let file = folder.join("vmlinux");
        Ok(file.exists().then_some(file))
    }

    /// The modules that a guest loads, in loading order; of `wanted`, those that are not there are
    /// built in.
    pub(crate) fn modules(&self, wanted: &[&str]) -> Result<Vec<PathBuf>> {
        let path = self.folder.join("modules.dep");
        let dependencies = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
        let is_module = |name: &&str| dependencies.contains(&format!("/{name}.ko:"));
        let wanted: Vec<_> = wanted.iter().copied().filter(is_module).collect();
        let files = depends::order(&dependencies, &wanted)?;
        Ok(files.iter().map(|file| self.folder.join(file)).collect())
    }
}

/// Runs [`LISTS`] and what follows it in the root.
fn download(root: &Root, script: &str, arguments: [&str; 3], log: &Path) -> Result<()> {
    root.tool("sh", log).args(["-c", &format!("{LISTS}{script}"), "sh"]).args(arguments).run()
}

impl Release {
    /// Lines of a sources.list.
    fn sources(&self) -> Result<String> {
        let mirror = mirror::find()?;
        Ok(self
            .sources
            .iter()
            .map(|(part, suite)| format!("deb {mirror}{part} {suite} main\n"))
            .collect())
    }
}
