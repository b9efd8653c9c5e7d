// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Other projects' tools: each opens the ELF core that `kvmmem dump` makes of a real guest, without an option.
//!
//! The guest is Debian's kernel, of the test bed, in this machine's QEMU without hardware virtualisation. It has no root file
//! system, so it panics and stands still: its page tables and its VMCOREINFO note are there by then. The tools come from
//! Debian, in a folder of the cache, and from the Python package index, in another; those that cannot be had are skipped.
//! What needs the kernel's debug information (most of crash, and drgn's stacks) is not tried: Debian's package of that has
//! about 1 GB.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

use crate::bed::Bed;
use crate::cache::{Cache, Key};
use crate::root::{self, Root};
use crate::running::Running;
use crate::suite::Suite;
use crate::tool::{Tool, is_installed, is_root};
use crate::{mirror, nested, ui};

/// The Debian release that its tools come from, and which they are.
const SUITE: &str = "trixie";
const DEBIAN: [&str; 2] = ["crash", "makedumpfile"];

/// The Python packages.
const PYTHON: [&str; 2] = ["drgn==0.3.0", "volatility3==2.28.2"];

/// Why stacks are not shown.
const NO_DEBUG_INFORMATION: &str =
    "it needs the kernel's debug information, which has 1 GB and is not installed here";

/// What drgn runs: prints the release of the note, and that at the virtual address that the note gives.
const DRGN: &str = r#"
import re
note = prog["VMCOREINFO"].string_().decode()
number = lambda key, base: int(re.search(re.escape(key) + "=(.*)", note)[1], base)
name = number("SYMBOL(init_uts_ns)", 16) + number("OFFSET(uts_namespace.name)", 10) + 130
print(prog["UTS_RELEASE"].string_().decode(), prog.read(name, 65).split(b"\0")[0].decode())
"#;

/// The suite.
pub(crate) fn run(cache: &Cache, bed: &Bed, suite: &mut Suite) -> Result<()> {
    let scratch = cache.scratch()?;
    let log = cache.fresh_log("tools")?;
    let core = scratch.path().join("core");
    let made = ui::step("tools: a guest and its core", || dump(bed, scratch.path(), &core, &log));
    let is_made = made.is_ok();
    suite.check("an ELF core of a guest", made);
    if !is_made {
        return Ok(());
    }
    let release = bed.kernel().release();
    gdb(suite, &core, &log);
    debian(cache, suite, &core, release, &log);
    python(cache, suite, &core, release, &log);
    Ok(())
}

/// Boots the guest, and dumps its memory to `core`.
fn dump(bed: &Bed, folder: &Path, core: &Path, log: &Path) -> Result<()> {
    let path = |name: &str| folder.join(name).to_string_lossy().into_owned();
    let (serial, qmp, socket) = (path("serial"), path("qmp"), path("broker"));
    let mut qemu = Command::new(nested::QEMU);
    qemu.args(["-accel", "tcg", "-cpu", "max", "-smp", "2", "-nodefaults", "-display", "none", "-m", "512M"])
        .args([
            "-object",
            "memory-backend-memfd,id=ram,size=512M,share=on",
            "-machine",
            "q35,memory-backend=ram",
        ])
        .args(["-name", "guest=tools", "-append", "console=ttyS0"])
        .args(["-serial", &format!("file:{serial}"), "-qmp", &format!("unix:{qmp},server=on,wait=off")])
        .arg("-kernel")
        .arg(bed.kernel().image());
    let mut qemu = Running::start(&mut qemu, log)?;
    qemu.wait("the guest's kernel to stop", || {
        fs::read(&serial).is_ok_and(|text| text.windows(20).any(|part| part == b"end Kernel panic - n"))
    })?;
    let mut broker = Command::new(bed.program("kvmmemd"));
    let mut broker = Running::start(broker.args(["--socket", &socket]), log)?;
    let kvmmem = || Tool::new(bed.program("kvmmem"), log).env("KVMMEM_BROKER", &socket);
    broker.wait("the broker to listen", || kvmmem().arg("targets").run().is_ok())?;
    kvmmem().args(["target", "add", "--qmp", &qmp]).run()?;
    let record = kvmmem()
        .env("KVMMEM_DEVICE", "/nonexistent")
        .args(["dump", "--target", "tools", "--format", "elf", "--pause", "--json"])
        .arg(core)
        .output()?;
    let record: serde_json::Value = serde_json::from_str(&record).context("dump printed no record")?;
    let (found, release) = (&record["vmcoreinfo"]["release"], bed.kernel().release());
    ensure!(found == release, "the record tells of kernel {found}, and the guest has {release}");
    let vcpus = &record["registers"]["vcpus"];
    ensure!(vcpus == 2, "the record tells of {vcpus} vCPUs, and the guest has 2");
    Ok(())
}

/// gdb, of this machine: it shows a thread for each vCPU, in the kernel, and reads memory by the direct map.
fn gdb(suite: &mut Suite, core: &Path, log: &Path) {
    const CHECK: &str = "gdb shows a core's vCPUs";
    if !is_installed("gdb") {
        return suite.skip(&format!("{CHECK}: install gdb"));
    }
    let commands = ["info threads", "thread apply all info registers rip"];
    let words = commands.iter().flat_map(|command| ["-ex", command]);
    let found = Tool::new("gdb", log).args(["-q", "-nx", "-batch"]).args(words).arg("-c").arg(core).output();
    let shown = found.and_then(|found| {
        tells(&found, "LWP 2")?;
        let inside =
            found.lines().filter(|line| line.starts_with("rip ") && line.contains("0xffffffff")).count();
        ensure!(inside == 2, "not both vCPUs are in the kernel: {found:?}");
        Ok(())
    });
    suite.check(CHECK, shown);
}

/// crash and makedumpfile.
fn debian(cache: &Cache, suite: &mut Suite, core: &Path, release: &str, log: &Path) {
    let skip = |suite: &mut Suite, why: &str| {
        for tool in DEBIAN {
            suite.skip(&format!("{tool} does not open a core: {why}"));
        }
    };
    if !is_root() && !is_installed("sudo") {
        return skip(suite, "root makes the folder that it is in; run as root, or install sudo");
    }
    let root = match debian_root(cache, log) {
        Ok(root) => root,
        Err(error) => return skip(suite, &format!("it comes from Debian's mirror: {error:#}")),
    };
    let inside = format!("/tmp/{}", std::process::id());
    let folder = root.path(&inside);
    let copied = Tool::as_root("mkdir", log).arg(&folder).run().and_then(|()| {
        Tool::as_root("cp", log).args(["--sparse=always", "--"]).arg(core).arg(folder.join("core")).run()
    });
    let tried = copied.map(|()| {
        let core = format!("{inside}/core");
        let smaller =
            root.tool("makedumpfile", log).args(["-f", "-d", "1", &core, &format!("{inside}/smaller")]);
        suite.check("makedumpfile leaves out a core's zero pages", smaller.run());
        let found = root.tool("crash", log).args(["--osrelease", &core]).output();
        suite.check("crash tells a core's kernel", found.and_then(|found| tells(&found, release)));
        suite.skip(&format!("crash does not show stacks (bt -a): {NO_DEBUG_INFORMATION}"));
    });
    if let Err(error) = tried {
        suite.fail("Debian's tools get the core", &error);
    }
    if let Err(error) = root::remove(&folder, log) {
        ui::say(&format!("  {error:#}"));
    }
}

/// A Debian system with its tools, made if it is not in the cache.
fn debian_root(cache: &Cache, log: &Path) -> Result<Root> {
    let mut key = Key::default();
    [SUITE].iter().chain(&DEBIAN).for_each(|word| key.add(word));
    let folder = cache.folder().join(format!("tools-{}", key.finish()));
    let _lock = cache.lock()?;
    if !folder.exists() {
        let partial = cache.folder().join("partial-tools");
        root::remove(&partial, log)?;
        ui::step("tools: crash and makedumpfile, in a folder", || {
            Tool::as_root("mmdebstrap", log)
                .args(["--variant=apt", "--format=directory"])
                .arg(format!("--include={}", DEBIAN.join(",")))
                .arg("--aptopt=APT::Install-Recommends \"false\"")
                .arg(SUITE)
                .arg(&partial)
                .arg(format!("deb {} {SUITE} main", mirror::find()?))
                .run()
        })?;
        Tool::as_root("mv", log).arg(&partial).arg(&folder).run()?;
    }
    Ok(Root::at(folder))
}

/// drgn and volatility3.
fn python(cache: &Cache, suite: &mut Suite, core: &Path, release: &str, log: &Path) {
    let folder = match environment(cache, log) {
        Ok(folder) => folder,
        Err(error) => {
            for package in PYTHON {
                suite.skip(&format!(
                    "{package} does not open a core: install python3-venv, and let pip reach a package index: {error:#}"
                ));
            }
            return;
        }
    };
    let drgn = Tool::new(folder.join("bin/drgn"), log).args(["-q", "-e", DRGN, "-c"]).arg(core);
    suite.check(
        "drgn reads a core by its kernel's page tables",
        drgn.output().and_then(|found| tells(&found, &format!("{release} {release}"))),
    );
    suite.skip(&format!("drgn does not show stacks of running tasks: {NO_DEBUG_INFORMATION}"));
    let volatility =
        Tool::new(folder.join("bin/vol"), log).args(["-q", "-f"]).arg(core).arg("banners.Banners");
    suite.check(
        "volatility3 finds a core's kernel",
        volatility.output().and_then(|found| tells(&found, &format!("Linux version {release} "))),
    );
}

/// A Python environment with its tools, made if it is not in the cache.
pub(crate) fn environment(cache: &Cache, log: &Path) -> Result<PathBuf> {
    let mut key = Key::default();
    PYTHON.iter().for_each(|word| key.add(word));
    let folder = cache.folder().join(format!("python-{}", key.finish()));
    // Its programs name the folder that they were made in, so it cannot be made elsewhere.
    let complete = folder.join("complete");
    let _lock = cache.lock()?;
    if !complete.exists() {
        ui::step("tools: drgn and volatility3, in a folder", || {
            Tool::new("python3", log).args(["-m", "venv", "--clear"]).arg(&folder).run()?;
            Tool::new(folder.join("bin/pip"), log).args(["install", "-q"]).args(PYTHON).run()
        })?;
        fs::write(&complete, "")?;
    }
    Ok(folder)
}

fn tells(found: &str, expected: &str) -> Result<()> {
    ensure!(found.contains(expected), "it does not tell {expected:?}, but {found:?}");
    Ok(())
}
