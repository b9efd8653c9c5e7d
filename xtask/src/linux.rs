// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Linux guests of several kernels, booted by this machine's QEMU: what `kvmmem` finds in their
//! memory is compared with what the guests' own /proc shows.

mod compare;
pub(crate) mod guest;
mod hooks;
pub(crate) mod kernels;
mod memory;
mod mounts;
mod process_core;
mod truth;

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::{fs, thread};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::Value;

use crate::binaries::ProgramSet;
use crate::cache::Cache;
use crate::linux::guest::{Guest, Variant};
use crate::linux::kernels::Stock;
use crate::linux::truth::Truth;
use crate::process::Process;
use crate::suite::{self, Name, Suite};
use crate::test_bed::TestBed;
use crate::tool::Tool;
use crate::{interrupt, project, ui};

/// The name of the suite among the scenarios, and its line in their list.
pub(crate) const SCENARIO: &str = "linux";
pub(crate) const LISTED: &str =
    "linux                  what the command says about Linux guests; by itself\n";

/// The program that the guests run.
const SCENE: &str = "tests/linux/scene.c";

/// Guests that are booted at once: each keeps a CPU busy until its scene is there.
const AT_ONCE: usize = 2;

/// A kernel of each kind, with different options.
const VARIANTS: [Variant; 3] = [
    Variant {
        name: "bookworm",
        kernel: "bookworm",
        memory: 512,
        machine: "pc",
        cpu: "max,-la57",
        options: "pti=on",
    },
    Variant {
        name: "trixie-la57",
        kernel: "trixie",
        memory: 1024,
        machine: "q35",
        cpu: "max",
        options: "pti=on",
    },
    Variant {
        name: "bed",
        kernel: "bed",
        memory: 1024,
        machine: "q35",
        cpu: "max,-la57",
        options: "vsyscall=xonly",
    },
];

/// Checks that only a run of this suite by its name has.
const MORE: [Variant; 6] = [
    Variant {
        name: "bullseye",
        kernel: "bullseye",
        memory: 512,
        machine: "pc",
        cpu: "max,-la57",
        options: "pti=on",
    },
    Variant {
        name: "bookworm-5g",
        kernel: "bookworm",
        memory: 5120,
        machine: "pc",
        cpu: "max,-la57",
        options: "",
    },
    Variant {
        name: "trixie-wrap",
        kernel: "trixie",
        memory: 512,
        machine: "q35",
        cpu: "max,-la57",
        options: "scene=wrap",
    },
    Variant {
        name: "trixie-nokaslr",
        kernel: "trixie",
        memory: 512,
        machine: "pc",
        cpu: "max,-la57",
        options: "nokaslr vsyscall=emulate",
    },
    Variant {
        name: "bed-5g-la57",
        kernel: "bed",
        memory: 5120,
        machine: "q35",
        cpu: "max",
        options: "nokaslr",
    },
    Variant {
        name: "bed-wrap",
        kernel: "bed",
        memory: 512,
        machine: "q35",
        cpu: "max",
        options: "scene=wrap",
    },
];

/// A verb with its options, and what compares its rows with what the guest shows.
type Verb = (&'static [&'static str], fn(&Truth, &[Value]) -> Result<()>);

const VERBS: [Verb; 10] = [
    (&["ps"], compare::processes),
    (&["ps", "--threads"], compare::threads),
    (&["ps", "--env"], compare::environments),
    (&["maps"], memory::maps),
    (&["files"], compare::files),
    (&["sockets"], compare::sockets),
    (&["check"], compare::untouched),
    (&["dmesg"], compare::log),
    (&["modules"], compare::modules),
    (&["info"], compare::kernel),
];

/// Exit code of `check` where it found something.
const CHECK_FOUND: i32 = 3;

/// The release that need not be there.
const OLDEST: &str = "bullseye";

/// Runs the suite with all of its guests; returns whether nothing failed.
pub(crate) fn run_alone() -> Result<bool> {
    let cache = Cache::open()?;
    let bed = TestBed::make(ProgramSet::All)?;
    let mut suite = Suite::new(Name::Linux);
    run_with(&cache, &bed, &mut suite, VARIANTS.iter().chain(&MORE))?;
    Ok(suite::summary(&[suite.finish()]))
}

/// The suite.
pub(crate) fn run(cache: &Cache, bed: &TestBed, suite: &mut Suite) -> Result<()> {
    run_with(cache, bed, suite, VARIANTS.iter())
}

/// Builds the program that the guests run.
pub(crate) fn scene(folder: &Path, log: &Path) -> Result<PathBuf> {
    let scene = folder.join("scene");
    Tool::new("cc", log)
        .args(["-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o"])
        .arg(&scene)
        .arg(SCENE)
        .dir(project::root())
        .run()?;
    Ok(scene)
}

fn run_with<'a>(
    cache: &Cache,
    bed: &TestBed,
    suite: &mut Suite,
    variants: impl Iterator<Item = &'a Variant>,
) -> Result<()> {
    let scratch = cache.scratch()?;
    let log = cache.fresh_log("linux")?;
    let _watch = interrupt::watch()?;
    let scene = scene(scratch.path(), &log)?;
    let mut guests = Vec::new();
    for variant in variants {
        match Stock::make(cache, bed, variant.kernel, &log) {
            Ok(stock) => guests.push((variant, stock)),
            // It is old: a mirror may lack it.
            Err(error) if variant.kernel == OLDEST => {
                suite.skip(&format!("no guest {}: {error:#}", variant.name))
            }
            Err(error) => suite.fail(&format!("{}: its kernel", variant.name), &error),
        }
    }
    let host = Host { bed, socket: scratch.path().join("broker"), log };
    let mut broker = Command::new(bed.program("kvmmemd"));
    let mut broker = Process::start(broker.arg("--socket").arg(&host.socket), &host.log)?;
    broker.wait("the broker to listen", || host.kvmmem().args(["target", "list"]).run().is_ok())?;
    let queue = Mutex::new(guests.iter());
    let work = || {
        let mut checks = Vec::new();
        let next = || queue.lock().ok()?.next();
        while let Some((variant, stock)) = next() {
            ui::say(&format!("  {}: {}", variant.name, stock.release));
            let folder = scratch.path().join(variant.name);
            host.examine((variant, stock), &scene, &folder, &mut checks);
            // Its dump is there.
            let _ = fs::remove_dir_all(&folder);
        }
        checks
    };
    let checks: Vec<_> = thread::scope(|scope| {
        let workers: Vec<_> = (0..AT_ONCE).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .map(|worker| worker.join().map_err(|_| anyhow!("a worker panicked")))
            .collect()
    });
    for checks in checks {
        for (name, result) in checks? {
            suite.check(&name, result);
        }
    }
    Ok(())
}

/// What a verb prints with --json.
fn rows(text: &str) -> Result<Vec<Value>> {
    text.lines()
        .map(|line| serde_json::from_str(line).with_context(|| format!("{line:?} is no JSON")))
        .collect()
}

/// What came of one check.
type Check = (String, Result<()>);

/// The command, with a broker for this machine's guests.
struct Host<'a> {
    bed: &'a TestBed,
    socket: PathBuf,
    log: PathBuf,
}

impl Host<'_> {
    /// Boots a guest, and compares.
    fn examine(
        &self,
        guest: (&Variant, &Stock),
        scene: &Path,
        folder: &Path,
        checks: &mut Vec<Check>,
    ) {
        let (variant, stock) = guest;
        let mut check = |what: &str, result: Result<()>| {
            let is_fine = result.is_ok();
            checks.push((format!("{}: {what}", variant.name), result));
            is_fine
        };
        let booted =
            Guest::start(variant, stock, scene, folder, &[], &self.log).and_then(|mut guest| {
                let truth = guest.truth()?;
                self.kvmmem().args(["target", "add", "--qmp"]).arg(guest.qmp()).run()?;
                Ok((guest, truth))
            });
        let (_guest, truth) = match booted {
            Ok(booted) => booted,
            Err(error) => {
                check("it plays its scene", Err(error));
                return;
            }
        };
        let dump = folder.join("dump");
        let target = ["--target".into(), variant.name.into()];
        let dumped = self.kvmmem().arg("dump").args(&target).arg(&dump).run();
        let is_dumped = check("it is dumped", dumped);
        let file = ["--file".into(), dump.clone().into_os_string()];
        let sources = [("running", target, true), ("from its dump", file, is_dumped)];
        for (how, source, _) in sources.iter().filter(|(_, _, is_there)| *is_there) {
            let print =
                |verb: Tool| verb.arg("--json").args(source).output().and_then(|text| rows(&text));
            for (verb, compare) in VERBS {
                let rows = print(self.kvmmem().args(verb));
                check(
                    &format!("{} {how}", verb.join(" ")),
                    rows.and_then(|rows| compare(&truth, &rows)),
                );
            }
            let of_process =
                memory::verbs(&truth).and_then(|verbs| Ok((verbs, mounts::verbs(&truth)?)));
            match of_process {
                Ok((memory, mounts)) => memory.iter().chain(&mounts).for_each(|(verb, compare)| {
                    let rows = print(self.kvmmem().args(verb));
                    check(
                        &format!("{} {how}", verb.join(" ")),
                        rows.and_then(|rows| compare(&rows)),
                    );
                }),
                Err(error) => drop(check("it has the scene's processes", Err(error))),
            }
        }
        for (how, source, _) in sources.iter().filter(|(_, _, is_there)| *is_there) {
            check(&format!("scan --pid {how}"), self.scan_process(&truth, source));
        }
        for (how, source, _) in sources.iter().filter(|(_, _, is_there)| *is_there) {
            let core = folder.join(format!("core {how}"));
            check(&format!("dump --pid {how}"), self.core(source, &truth, &core));
        }
        let watch = [
            "ps",
            "--watch",
            "--count",
            "3",
            "--interval",
            "100ms",
            "--json",
            "--target",
            variant.name,
        ];
        let rows_of = |tool: Tool| tool.output().and_then(|text| rows(&text));
        check(
            "ps --watch running",
            rows_of(self.kvmmem().args(watch)).and_then(|rows| compare::changes(&rows)),
        );
        let all = rows_of(self.kvmmem().args(["info", "--all", "--json"]));
        check("info --all", all.and_then(|rows| compare::machine(&truth, variant.name, &rows)));
        if is_dumped {
            check("check after tampering", self.tamper(&dump));
        }
    }

    /// Looks for a long command line in the memory of its process, where it takes more than a page.
    fn scan_process(&self, truth: &Truth, source: &[OsString; 2]) -> Result<()> {
        let (pid, line) = compare::long_command_line(truth)?;
        let pattern: String = line.iter().map(|byte| format!("{byte:02x}")).collect();
        let text = self
            .kvmmem()
            .args(["scan", "--json", "--pid", &pid, &pattern])
            .args(source)
            .output()?;
        let found = rows(&text)?;
        let is_whole = |row: &Value| row["len"] == line.len() && row["gva"].is_string();
        ensure!(
            !found.is_empty() && found.iter().all(is_whole),
            "the command line of {pid} is found as {text}"
        );
        Ok(())
    }

    /// Writes the core of one of the guest's processes, and compares.
    fn core(&self, source: &[OsString; 2], truth: &Truth, core: &Path) -> Result<()> {
        let pid = process_core::quiet(truth)?;
        let pause = source.first().filter(|option| *option == "--target").map(|_| "--pause");
        let dump = self.kvmmem().args(["dump", "--pid", &pid.to_string()]).args(pause).args(source);
        dump.arg(core).run()?;
        process_core::compare(truth, pid, &fs::read(core)?)
    }

    /// Hides a process and a module in a dump and hooks a system call; `check` finds these.
    fn tamper(&self, dump: &Path) -> Result<()> {
        let expected = hooks::write(dump)?;
        let arguments = ["check", "--json", "--file"];
        let text = self.kvmmem().args(arguments).arg(dump).exits_with(CHECK_FOUND)?;
        hooks::compare(&expected, &rows(&text)?)
    }

    fn kvmmem(&self) -> Tool {
        Tool::new(self.bed.program("kvmmem"), &self.log)
            .env("KVMMEM_BROKER", &self.socket)
            // This machine may be an introspector itself.
            .env("KVMMEM_DEVICE", "/nonexistent")
    }
}
