// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Other projects' tools: each opens the ELF core that `kvmmem dump` makes of a real guest, without
//! an option.
//!
//! The guest is Debian's kernel, of the test bed, in this machine's QEMU without hardware
//! virtualisation. It has no root file system, so it panics and stands still: its page tables and
//! its VMCOREINFO note are there by then. The tools come from Debian, in a folder of the cache, and
//! from the Python package index, in another; tools that cannot be had are skipped, as are stacks
//! without the kernel's debug information in the cache ([`debug_kernel`]).

mod debug_kernel;
mod guest;

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};

use crate::cache::{Cache, Key};
use crate::root::{self, Root};
use crate::suite::Suite;
use crate::test_bed::TestBed;
use crate::tool::{Tool, is_installed, is_root};
use crate::{mirror, ui};
use guest::{Registers, VCPUS, register};

/// The Debian release that its tools come from, and which they are.
const SUITE: &str = "trixie";
const DEBIAN: [&str; 2] = ["crash", "makedumpfile"];

/// The Python packages.
const PYTHON: [&str; 2] = ["drgn==0.3.0", "volatility3==2.28.2"];

/// What drgn runs: prints the release of the note, and that at the virtual address that the note
/// gives.
const DRGN: &str = r#"
import re
note = prog["VMCOREINFO"].string_().decode()
number = lambda key, base: int(re.search(re.escape(key) + "=(.*)", note)[1], base)
name = number("SYMBOL(init_uts_ns)", 16) + number("OFFSET(uts_namespace.name)", 10) + 130
print(prog["UTS_RELEASE"].string_().decode(), prog.read(name, 65).split(b"\0")[0].decode())
"#;

/// What drgn runs with debug information: each vCPU's stack, from the registers in the core on.
const STACKS: &str = r#"
from drgn.helpers.linux.sched import cpu_curr
for cpu in range(2):
    trace = prog.stack_trace(cpu_curr(prog, cpu))
    print("cpu", cpu, hex(trace[0].pc), " ".join(str(frame.name) for frame in trace))
"#;

/// The suite.
pub(crate) fn run(cache: &Cache, bed: &TestBed, suite: &mut Suite) -> Result<()> {
    let scratch = cache.scratch()?;
    let log = cache.fresh_log("tools")?;
    let core = scratch.path().join("core");
    let made =
        ui::step("tools: a guest and its core", || guest::dump(bed, scratch.path(), &core, &log));
    let registers = match made {
        Ok(registers) => registers,
        Err(error) => {
            suite.fail("an ELF core of a guest", &error);
            return Ok(());
        }
    };
    suite.check(
        "an ELF core has each vCPU's page tables",
        guest::has_page_tables(&core, &registers),
    );
    let release = bed.kernel().release();
    let debug = debug_kernel::find(cache, bed, &log);
    gdb(suite, &core, &registers, &log);
    debian(cache, suite, &core, release, debug.as_deref(), &log);
    python(cache, suite, (&core, &registers), release, debug.as_deref(), &log);
    Ok(())
}

/// Whether the stacks of a kernel can be shown; prints the reason if not.
fn debugged<'a>(
    suite: &mut Suite,
    tool: &str,
    vmlinux: Result<&'a Path, &anyhow::Error>,
) -> Option<&'a Path> {
    vmlinux.map_err(|error| suite.skip(&format!("{tool} does not show stacks: {error:#}"))).ok()
}

/// gdb, of this machine: it shows a thread for each vCPU, with what that has in its registers.
fn gdb(suite: &mut Suite, core: &Path, registers: &[Registers], log: &Path) {
    const CHECK: &str = "gdb shows a core's vCPUs";
    if !is_installed("gdb") {
        return suite.skip(&format!("{CHECK}: install gdb"));
    }
    let of_thread =
        |thread| format!("thread apply {thread} info registers rip rsp rbp rbx r12 eflags");
    let commands = [vec!["info threads".to_owned()], (1..=VCPUS).map(of_thread).collect()].concat();
    let words = commands.iter().flat_map(|command| ["-ex", command]);
    let found = Tool::new("gdb", log)
        .args(["-q", "-nx", "-batch"])
        .args(words)
        .arg("-c")
        .arg(core)
        .output();
    suite.check(CHECK, found.and_then(|found| shows(&found, registers)));
}

/// Whether what gdb has printed of the threads is what their vCPUs have.
fn shows(found: &str, registers: &[Registers]) -> Result<()> {
    let (threads, shown) =
        found.split_once("Thread 1 (LWP 1)").context("gdb shows no registers")?;
    ensure!(threads.matches("LWP").count() >= VCPUS, "gdb shows other threads: {threads:?}");
    let shown: Vec<&str> = shown.split("Thread ").collect();
    ensure!(shown.len() == registers.len(), "gdb shows registers of {} threads", shown.len());
    for (shown, registers) in shown.iter().zip(registers) {
        for (name, qemu) in [
            ("rip", "RIP"),
            ("rsp", "RSP"),
            ("rbp", "RBP"),
            ("rbx", "RBX"),
            ("r12", "R12"),
            ("eflags", "RFL"),
        ] {
            let line = shown.lines().find(|line| line.split_whitespace().next() == Some(name));
            let value = line.and_then(|line| line.split_whitespace().nth(1)?.strip_prefix("0x"));
            let value = value.and_then(|value| u64::from_str_radix(value, 16).ok());
            let expected = register(registers, qemu)?;
            ensure!(
                value == Some(expected),
                "{name} of a vCPU is {expected:#x}, and gdb shows {line:?}"
            );
        }
    }
    Ok(())
}

/// crash and makedumpfile.
fn debian(
    cache: &Cache,
    suite: &mut Suite,
    core: &Path,
    release: &str,
    vmlinux: Result<&Path, &anyhow::Error>,
    log: &Path,
) {
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
        Tool::as_root("cp", log)
            .args(["--sparse=always", "--"])
            .arg(core)
            .arg(folder.join("core"))
            .run()
    });
    let tried = copied.map(|()| {
        let core = format!("{inside}/core");
        let smaller = root.tool("makedumpfile", log).args([
            "-f",
            "-d",
            "1",
            &core,
            &format!("{inside}/smaller"),
        ]);
        suite.check("makedumpfile leaves out a core's zero pages", smaller.run());
        let found = root.tool("crash", log).args(["--osrelease", &core]).output();
        suite.check("crash tells a core's kernel", found.and_then(|found| tells(&found, release)));
        if let Some(vmlinux) = debugged(suite, "crash", vmlinux) {
            suite.check("crash shows the vCPUs' stacks", crash(&root, &inside, vmlinux, log));
        }
    });
    if let Err(error) = tried {
        suite.fail("Debian's tools get the core", &error);
    }
    if let Err(error) = root::remove(&folder, log) {
        ui::say(&format!("  {error:#}"));
    }
}

/// Whether crash shows the stack of each vCPU. This release of it does not know the slabs of the
/// newest kernels.
fn crash(root: &Root, inside: &str, vmlinux: &Path, log: &Path) -> Result<()> {
    debug_kernel::link(vmlinux, &root.path(&format!("{inside}/vmlinux")), log)?;
    let script = format!(
        "printf 'bt -a\\nquit\\n' | crash -s --no_kmem_cache {inside}/vmlinux {inside}/core"
    );
    let found = root.tool("sh", log).args(["-c", &script]).output()?;
    // One has found no root file system.
    ["CPU: 0 ", "CPU: 1 ", " panic at ", " mount_root_generic at ", " kernel_init at "]
        .iter()
        .try_for_each(|part| tells(&found, part))
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
fn python(
    cache: &Cache,
    suite: &mut Suite,
    (core, registers): (&Path, &[Registers]),
    release: &str,
    vmlinux: Result<&Path, &anyhow::Error>,
    log: &Path,
) {
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
    if let Some(vmlinux) = debugged(suite, "drgn", vmlinux) {
        let drgn =
            Tool::new(folder.join("bin/drgn"), log).args(["-q", "-e", STACKS, "-c"]).arg(core);
        let found = drgn.arg("-s").arg(vmlinux).output();
        suite.check(
            "drgn shows the vCPUs' stacks",
            found.and_then(|found| stacks(&found, registers)),
        );
    }
    let volatility =
        Tool::new(folder.join("bin/vol"), log).args(["-q", "-f"]).arg(core).arg("banners.Banners");
    suite.check(
        "volatility3 finds a core's kernel",
        volatility.output().and_then(|found| tells(&found, &format!("Linux version {release} "))),
    );
}

/// Whether what drgn has printed are stacks that begin where the vCPUs are.
fn stacks(found: &str, registers: &[Registers]) -> Result<()> {
    for (cpu, registers) in registers.iter().enumerate() {
        tells(found, &format!("cpu {cpu} {:#x} ", register(registers, "RIP")?))?;
    }
    // One has found no root file system.
    tells(found, " panic mount_root_generic prepare_namespace kernel_init_freeable kernel_init ")
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
