// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The stock QEMUs of two Debian releases, as a disk image for the emulated host.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::cache::{Cache, Key};
use crate::root::{self, BACKPORTS};
use crate::tool::Tool;
use crate::{mirror, ui};

/// One release's QEMU. Its folder on the disk has the release's name.
struct Release {
    name: &'static str,
    /// Where its packages come from; the last one is preferred.
    suites: &'static [&'static str],
}

/// The oldest and the newest that users have.
const RELEASES: [Release; 2] = [
    Release { name: "bookworm", suites: &["bookworm"] },
    Release { name: "trixie", suites: &["trixie", BACKPORTS] },
];

/// The emulator, its firmware and what they need.
const PACKAGE: &str = "qemu-system-x86";

/// What the packages do not hold: places to mount on, and the links of a merged /usr.
const SKELETON: &str = "cd \"$1\" && mkdir -p bed dev proc sys tmp run usr/bin usr/sbin usr/lib usr/lib64 && \
     for name in bin sbin lib lib64; do ln -s usr/$name $name; done";

/// Makes the image's file system.
pub(crate) const MKE2FS: &str = "/sbin/mke2fs";

/// Size of the image: it is sparse, so only what is in it counts.
const SIZE: &str = "2G";

/// The image, made if it is not there. The cache must be locked.
pub(crate) fn make(cache: &Cache) -> Result<PathBuf> {
    let image = cache.folder().join(format!("qemus-{}.img", key()));
    if !image.exists() {
        let log = cache.fresh_log("qemus")?;
        let partial = cache.folder().join("partial-qemus");
        root::remove(&partial, &log)?;
        fs::create_dir(&partial)?;
        for release in &RELEASES {
            let title =
                format!("stock QEMU of Debian {}", release.suites.last().unwrap_or(&release.name));
            ui::step(&title, || extract(release, &partial.join(release.name), &log))?;
        }
        ui::step("stock QEMUs: disk image", || pack(&partial, &image, &log))?;
        root::remove(&partial, &log)?;
    }
    Ok(image)
}

fn key() -> String {
    let mut key = Key::default();
    [PACKAGE, SKELETON, SIZE].iter().for_each(|word| key.add(word));
    for release in &RELEASES {
        key.add(release.name);
        release.suites.iter().for_each(|suite| key.add(suite));
    }
    key.finish()
}

/// Unpacks a release's QEMU with all it needs; nothing of it is configured or run.
fn extract(release: &Release, folder: &Path, log: &Path) -> Result<()> {
    let mirror = mirror::find()?;
    let preferred = release.suites.last().unwrap_or(&release.name);
    Tool::as_root("mmdebstrap", log)
        .args(["--variant=extract", "--format=directory"])
        .arg(format!("--include={PACKAGE}"))
        .arg("--aptopt=APT::Install-Recommends \"false\"")
        .arg(format!("--aptopt=APT::Default-Release \"{preferred}\""))
        .arg(format!("--setup-hook={SKELETON}"))
        .arg(release.name)
        .arg(folder)
        .args(release.suites.iter().map(|suite| format!("deb {mirror} {suite} main")))
        .run()
}

/// Makes a file system of a folder's content.
fn pack(folder: &Path, image: &Path, log: &Path) -> Result<()> {
    let partial = image.with_extension("partial");
    // mke2fs would take what an interrupted run left for an image to ask about.
    root::remove(&partial, log)?;
    Tool::as_root(MKE2FS, log)
        .args(["-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d"])
        .arg(folder)
        .arg(&partial)
        .arg(SIZE)
        .run()?;
    Tool::as_root("mv", log).arg(&partial).arg(image).run()
}
