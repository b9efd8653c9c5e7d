// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Tries the packages in a clean Debian system in a folder: `packaging/check.sh` has the steps.

use std::fs;
use std::os::unix::fs::FileTypeExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use super::Release;
use crate::binaries::{Binaries, ProgramSet};
use crate::cache::{Cache, Key};
use crate::kernel::Kernel;
use crate::provision::{self, Purpose};
use crate::root::{self, Root};
use crate::suite::{self, Name, Suite};
use crate::tool::{Tool, is_installed, is_root};
use crate::{mirror, project, ui};

/// What the packages are for.
const SUITE: &str = "trixie";

/// What a user has beside a minimal system: a shell that completes, a compiler, manual pages.
const TOOLS: [&str; 5] = ["man-db", "bash-completion", "gcc", "libc6-dev", "pkgconf"];

/// What the packages will need: only downloaded here, so that the check installs it without a
/// network.
const LATER: [&str; 3] = ["dkms", "systemd", "logrotate"];

/// Builds the module of package `$1` as DKMS does, in the build root `$0`, against its kernel
/// source `$2`. What is mounted goes with the mount namespace.
const BUILD: &str = "mount -t tmpfs none \"$0/mnt\" && dpkg-deb -x \"$1\" \"$0/mnt\" && mount --rbind /proc \"$0/proc\" && \
     exec chroot \"$0\" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin LC_ALL=C.UTF-8 sh -c \
     'cd /mnt/usr/src/kvmmem-* && make -C kernel KDIR=\"$0\" && test -f kernel/kvmmem.ko' \"$2\"";

/// Where the check is, inside the root.
const FOLDER: &str = "/kvmmem-check";

/// The suite of the packages alone; returns whether nothing failed.
pub(crate) fn run_alone() -> Result<bool> {
    let mut suite = Suite::new(Name::Packages);
    run(&Cache::open()?, &mut suite);
    Ok(suite::summary(&[suite.finish()]))
}

/// The suite of the packages.
pub(crate) fn run(cache: &Cache, suite: &mut Suite) {
    if let Err(error) = make_and_try(cache, suite) {
        suite.fail("the packages are made and tried", &error);
    }
}

/// Makes the packages, twice to compare them, and tries them.
fn make_and_try(cache: &Cache, suite: &mut Suite) -> Result<()> {
    if let Err(error) = super::provision(cache) {
        suite.skip(&format!("the packages are made on Debian only: {error:#}"));
        return Ok(());
    }
    let binaries = Binaries::make(cache, ProgramSet::Installed)?;
    let scratch = cache.scratch()?;
    let make = |folder: &str, revision| {
        let release = Release::of_checkout(cache, revision)?;
        super::make(cache, &release, &binaries, &scratch.path().join(folder))
    };
    let one = make("one", 1)?;
    suite.check(
        "two runs make the same packages",
        make("again", 1).and_then(|again| same(&one, &again)),
    );
    make("two", 2)?;
    module(cache, suite, &one)?;
    if !is_root() && !is_installed("sudo") {
        suite.skip(
            "the packages are not tried in a Debian system, which root makes: run as root, or install sudo",
        );
        return Ok(());
    }
    let clean = match clean(cache) {
        Ok(clean) => clean,
        Err(error) => {
            suite.skip(&format!(
                "the packages are tried where mmdebstrap can make a Debian system: {error:#}"
            ));
            return Ok(());
        }
    };
    let log = cache.fresh_log("packages")?;
    let copy = cache.folder().join(format!("run-packages-{}", std::process::id()));
    let tried = ui::step("packages: installed, used, upgraded, purged", || {
        try_in(&clean, &copy, scratch.path(), &log)
    });
    root::remove(&copy, &log)?;
    count(suite, &tried?)
}

/// Whether two runs gave the same bytes.
fn same(one: &[PathBuf], other: &[PathBuf]) -> Result<()> {
    for (one, other) in one.iter().zip(other) {
        if fs::read(one)? != fs::read(other)? {
            bail!("two runs made a different {}", one.file_name().unwrap_or_default().display());
        }
    }
    Ok(())
}

/// Builds the module from its package, where the test bed's build root is there to do it in.
fn module(cache: &Cache, suite: &mut Suite, packages: &[PathBuf]) -> Result<()> {
    let is_module = |path: &&PathBuf| {
        path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"kvmmem-dkms_"))
    };
    let package = packages.iter().find(is_module).context("there is no package kvmmem-dkms")?;
    let _lock = cache.lock()?;
    if !Kernel::is_prepared(cache) {
        suite.skip("the module is not built from its package: run cargo xtask module first");
        return Ok(());
    }
    let kernel = Kernel::make(cache, Root::make(cache)?)?;
    let log = cache.fresh_log("package-module")?;
    suite.check(
        "the module built from its package",
        ui::step("packages: the module built from its package", || {
            let root = kernel.root().path("");
            Tool::as_root("unshare", &log)
                .args(["--mount", "sh", "-c", BUILD])
                .args([root.as_path(), package, Path::new(kernel.source())])
                .run()
        }),
    );
    Ok(())
}

/// The clean system, made if it is not in the cache.
fn clean(cache: &Cache) -> Result<PathBuf> {
    let mut key = Key::default();
    [SUITE].iter().chain(&TOOLS).chain(&LATER).for_each(|word| key.add(word));
    let folder = cache.folder().join(format!("clean-{}", key.finish()));
    let _lock = cache.lock()?;
    if folder.exists() {
        return Ok(folder);
    }
    provision::provision(cache, Purpose::Build)?;
    let log = cache.fresh_log("clean-root")?;
    let partial = cache.folder().join("partial-clean");
    root::remove(&partial, &log)?;
    ui::step("clean root: a minimal Debian system in a folder", || {
        let mirror = mirror::find()?;
        Tool::as_root("mmdebstrap", &log)
            .args(["--variant=minbase", "--format=directory"])
            .arg(format!("--include={}", TOOLS.join(",")))
            .arg("--aptopt=APT::Install-Recommends \"false\"")
            .arg(SUITE)
            .arg(&partial)
            .arg(format!("deb {mirror} {SUITE} main"))
            .run()?;
        let null = partial.join("dev/null");
        if !fs::metadata(&null).is_ok_and(|null| null.file_type().is_char_device()) {
            bail!("device nodes cannot be made here (a container without CAP_MKNOD?)");
        }
        let root = Root::at(partial.clone());
        root.tool("apt-get", &log).args(["-q", "update"]).run()?;
        root.tool("apt-get", &log)
            .args(["-q", "-y", "--no-install-recommends", "--download-only", "install"])
            .args(LATER)
            .run()
    })?;
    fs::rename(&partial, &folder).with_context(|| format!("cannot make {}", folder.display()))?;
    Ok(folder)
}

/// Runs the check in a copy of the clean system; returns what it printed.
fn try_in(clean: &Path, copy: &Path, packages: &Path, log: &Path) -> Result<String> {
    Tool::as_root("cp", log).args(["-a", "--reflink=auto"]).arg(clean).arg(copy).run()?;
    let root = Root::at(copy.to_owned());
    let folder = root.path(FOLDER);
    Tool::as_root("mkdir", log).arg(&folder).run()?;
    Tool::as_root("cp", log)
        .arg("-r")
        .args([packages.join("one"), packages.join("two")])
        .args(["check.sh", "fake_vmm.c"].map(|name| project::root().join("packaging").join(name)))
        .arg(&folder)
        .run()?;
    root.tool("sh", log).args([&format!("{FOLDER}/check.sh"), FOLDER]).output()
}

/// A line of the check.
#[derive(Debug, PartialEq, Eq)]
enum Outcome<'a> {
    Passed,
    /// And what it was.
    Failed(&'a str),
    /// And why.
    Skipped(&'a str),
}

/// The outcomes among the lines that the check printed.
fn outcomes(lines: &str) -> impl Iterator<Item = Outcome<'_>> {
    lines.lines().filter_map(|line| match line.split_once(' ')? {
        ("not", rest) => rest.strip_prefix("ok ").map(Outcome::Failed),
        ("skip", why) => Some(Outcome::Skipped(why)),
        ("ok", _) => Some(Outcome::Passed),
        _ => None,
    })
}

/// Counts them; there must be some.
fn count(suite: &mut Suite, lines: &str) -> Result<()> {
    let mut any = false;
    for outcome in outcomes(lines) {
        match outcome {
            Outcome::Passed => suite.check("", Ok(())),
            Outcome::Failed(line) => {
                let (name, why) =
                    line.split_once(": ").unwrap_or((line, "see the log of the packages"));
                suite.fail(name, &anyhow::anyhow!("{why}"));
            }
            Outcome::Skipped(why) => suite.skip(why),
        }
        any = true;
    }
    if any { Ok(()) } else { bail!("the check of the packages printed nothing") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_told_apart() {
        let seen: Vec<_> =
            outcomes("ok one\nnoise\nnot ok two: why\nskip three: why\nnot that\nok four\n")
                .collect();
        let wanted = [
            Outcome::Passed,
            Outcome::Failed("two: why"),
            Outcome::Skipped("three: why"),
            Outcome::Passed,
        ];
        assert_eq!(seen, wanted);
        assert!(count(&mut Suite::new(Name::Packages), "").is_err());
    }
}
