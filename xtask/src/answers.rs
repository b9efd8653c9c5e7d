// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask bench answers`: how long `kvmmem ps` and `kvmmem dump` take of a Linux guest, as
//! whole commands, against the same of drgn, volatility3 and QEMU in the same run.
//!
//! All list the processes of one guest, which keeps still; a list that differs is an error. drgn
//! and volatility3 come from the Python package index. drgn needs the debug information of the
//! guest's kernel, from Debian; volatility3's symbol file is made of the guest's memory
//! ([`kernel`]). A peer that cannot be had is skipped, with a remedy.

mod kernel;
mod lister;
mod qmp;
mod row;
mod subject;

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context as _, Result, ensure};

use crate::binaries::ProgramSet;
use crate::cache::Cache;
use crate::monitor::Monitor;
use crate::test_bed::TestBed;
use crate::tool::is_root;
use crate::{interrupt, tools, ui};
use lister::{Lister, Who, nanoseconds};
use row::Row;
use subject::Subject;

/// What drgn runs.
const DRGN: &str = include_str!("answers/ps.py");

/// What runs that over QMP.
const DRGN_QMP: &str = include_str!("answers/qmp.py");

/// Runs of each command, unless the user wants others.
const ROUNDS: u32 = 9;

/// Runs of drgn over QMP at most: it takes a minute.
const SLOW_ROUNDS: u32 = 2;

/// Dumps of each kind at most: QEMU's has all of the guest's memory.
const DUMPS: u32 = 3;

/// How many times as fast as QEMU's a dump must be.
const DUMP: f64 = 2.6;

/// The most time that the list may take: with all files in the page cache, and with none.
const WARM_NS: u64 = 100_000_000;
const EMPTY_NS: u64 = 300_000_000;

#[derive(clap::Args)]
pub(crate) struct Options {
    /// answers: an ELF core of a Linux guest (kvmmem dump --format elf) instead of a guest that is
    /// booted
    #[arg(long, value_name = "CORE")]
    file: Option<PathBuf>,
    /// answers: how many times each command runs [default: 9]
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// answers: download the debug information of the guest's kernel for drgn, some 320 MB, unless
    /// it is there
    #[arg(long)]
    debug_information: bool,
}

impl Options {
    /// Whether any was given.
    pub(crate) fn is_given(&self) -> bool {
        self.file.is_some() || self.rounds.is_some() || self.debug_information
    }
}

/// A line: what is compared with which peer. Where `alone`, only the time counts that the peer
/// takes for the list itself, with its symbols loaded.
struct Line {
    name: &'static str,
    goal: f64,
    ours: Who,
    peer: Who,
    alone: bool,
}

const LINES: [Line; 5] = [
    Line {
        name: "ps of a running guest, against drgn over QMP",
        goal: 30.0,
        ours: Who::Running,
        peer: Who::DrgnQmp,
        alone: false,
    },
    Line {
        name: "the same, drgn's symbols loaded before",
        goal: 30.0,
        ours: Who::Running,
        peer: Who::DrgnQmp,
        alone: true,
    },
    Line {
        name: "ps of a running guest, against drgn reading QEMU's memory",
        goal: 3.0,
        ours: Who::Running,
        peer: Who::DrgnProcess,
        alone: false,
    },
    Line {
        name: "ps of a dump, against volatility3's pslist",
        goal: 30.0,
        ours: Who::Core,
        peer: Who::Volatility,
        alone: false,
    },
    Line {
        name: "ps of a dump, against drgn on the file",
        goal: 3.0,
        ours: Who::Core,
        peer: Who::DrgnCore,
        alone: false,
    },
];

pub(crate) fn run(options: &Options, is_json: bool) -> Result<()> {
    let cache = Cache::open()?;
    let bed = TestBed::make(ProgramSet::All)?;
    let log = cache.fresh_log("answers")?;
    let scratch = cache.scratch()?;
    let _watch = interrupt::watch()?;
    let subject = match &options.file {
        Some(core) => Subject::of_file(&bed, core, log),
        None => Subject::boot(&cache, &bed, scratch.path(), log)?,
    };
    let rounds = options.rounds.unwrap_or(ROUNDS);
    let mut listers = ours(&subject);
    match tools::environment(&cache, subject.log()) {
        Ok(python) => {
            let python = python.join("bin");
            let debug = subject.debug_information(&cache, options.debug_information);
            listers.extend(drgn(&subject, &python, debug, scratch.path())?);
            listers.extend(volatility(&subject, &python, scratch.path()));
        }
        Err(error) => ui::say(&format!(
            "  skipped: drgn and volatility3: install python3-venv, and let pip reach a package index: {error:#}"
        )),
    }
    ui::step("answers: lists of processes", || {
        warm_up(&mut listers)?;
        for round in 0..rounds {
            ensure!(!interrupt::was_seen(), "interrupted");
            let mut due = listers
                .iter_mut()
                .filter(|lister| round < SLOW_ROUNDS || lister.who != Who::DrgnQmp);
            due.try_for_each(Lister::run)?;
        }
        Ok(())
    })?;
    let mut rows = Vec::new();
    let find = |who: Who| listers.iter().find(|lister| lister.who == who);
    for lister in listers.iter().filter(|lister| lister.who.is_ours()) {
        rows.push(Row::within(
            format!("ps of {}, within 100 ms", lister.what()),
            WARM_NS,
            &lister.times,
        )?);
        let mut times = Vec::new();
        for _ in 0..rounds {
            subject.empty_page_cache()?;
            times.push(lister.time()?.took);
        }
        let name = "the same, nothing in the page cache, within 300 ms".to_owned();
        rows.push(Row::within(name, EMPTY_NS, &times)?);
    }
    for line in LINES {
        if let Some((ours, peer)) = find(line.ours).zip(find(line.peer)) {
            let theirs = if line.alone { &peer.alone } else { &peer.times };
            rows.push(Row::faster(line.name.to_owned(), line.goal, &ours.times, theirs)?);
        }
    }
    for drgn in listers.iter().filter(|lister| !lister.alone.is_empty()) {
        let times: Vec<u64> = drgn.alone.iter().map(|nanos| nanos / 1_000_000).collect();
        ui::say(&format!(
            "  {}, the list alone, with its symbols loaded: {times:?} ms",
            drgn.what()
        ));
    }
    rows.extend(dumps(&subject, scratch.path(), rounds.min(DUMPS))?);
    row::print(&rows, is_json)
}

/// `kvmmem ps` in its ways.
fn ours<'a>(subject: &'a Subject<'_>) -> Vec<Lister<'a>> {
    let core = || subject.kvmmem().args(["ps", "--file"]).arg(subject.core());
    let mut listers = vec![Lister::new(Who::Core, core)];
    if let Some(live) = subject.live() {
        listers.push(Lister::new(Who::Running, || {
            subject.kvmmem().args(["ps", "--target", subject::NAME])
        }));
        if is_root() {
            let target = format!("qmp:{}", live.second_monitor().display());
            listers.push(Lister::new(Who::Embedded, move || {
                subject
                    .kvmmem()
                    .env("KVMMEM_BROKER", "/nonexistent/broker")
                    .args(["ps", "--target", &target])
            }));
        } else {
            ui::say("  skipped: ps without a broker: only root can do without one");
        }
    }
    listers
}

/// drgn on the core, on the running guest by the monitor's unix socket, where it reads QEMU's
/// memory itself, and over QMP by TCP, where it asks the monitor for each word.
fn drgn<'a>(
    subject: &'a Subject<'_>,
    python: &Path,
    debug: Result<Option<PathBuf>>,
    folder: &Path,
) -> Result<Vec<Lister<'a>>> {
    let why = "it needs the debug information of the guest's kernel: give --debug-information";
    let debug = match debug {
        Ok(Some(debug)) => debug,
        Ok(None) => {
            ui::say(&format!("  skipped: drgn: {why}, which downloads some 320 MB"));
            return Ok(Vec::new());
        }
        Err(error) => {
            ui::say(&format!("  skipped: drgn: {why}, or a mirror that has it: {error:#}"));
            return Ok(Vec::new());
        }
    };
    let script = folder.join("ps.py");
    fs::write(&script, DRGN)?;
    let mut listers = Vec::new();
    if let Some(live) = subject.live() {
        let (over_qmp, note) = (folder.join("qmp.py"), kernel::note(subject.core(), folder)?);
        fs::write(&over_qmp, DRGN_QMP)?;
        let python = python.join("python3");
        let tcp = qmp::tcp_address(&live.second_monitor())?;
        for (who, address) in
            [(Who::DrgnQmp, tcp.into()), (Who::DrgnProcess, live.second_monitor())]
        {
            let words = [over_qmp.clone(), address, note.clone(), debug.clone(), script.clone()];
            let python = python.clone();
            listers.push(Lister::new(who, move || subject.tool(&python).args(&words)));
        }
    }
    let program = python.join("drgn");
    listers.push(Lister::new(Who::DrgnCore, move || {
        let drgn = subject.tool(&program).args(["-q", "--no-default-symbols", "-s"]).arg(&debug);
        drgn.arg("-c").arg(subject.core()).arg(&script)
    }));
    Ok(listers)
}

/// volatility3 on the core, with a cache of its own that is full after the first run.
fn volatility<'a>(subject: &'a Subject<'_>, python: &Path, folder: &Path) -> Option<Lister<'a>> {
    let made = ui::step("answers: volatility3's symbol file", || {
        kernel::symbols(subject.core(), folder, &python.join("python3"), subject.log())
    });
    let symbols = match made {
        Ok(symbols) => symbols,
        Err(error) => {
            ui::say(&format!("  skipped: volatility3: its symbol file cannot be made: {error:#}"));
            return None;
        }
    };
    let (program, cache) = (python.join("vol"), folder.join("volatility-cache"));
    if let Err(error) = fs::create_dir(&cache) {
        ui::say(&format!("  skipped: volatility3: {}: {error}", cache.display()));
        return None;
    }
    Some(Lister::new(Who::Volatility, move || {
        let tool =
            subject.tool(&program).args(["-q", "-f"]).arg(subject.core()).arg("-s").arg(&symbols);
        tool.arg("--cache-path").arg(&cache).arg("linux.pslist.PsList")
    }))
}

/// Runs each once, and compares the lists. A peer that fails is skipped.
fn warm_up(listers: &mut Vec<Lister<'_>>) -> Result<()> {
    let mut lists = Vec::new();
    let mut index = 0;
    while let Some(lister) = listers.get(index) {
        ensure!(!interrupt::was_seen(), "interrupted");
        match lister.time() {
            Ok(run) => {
                lists.push((lister.what(), run.pids));
                index += 1;
            }
            Err(error) if !lister.who.is_ours() => {
                ui::say(&format!("  skipped: {}: {error:#}", lister.what()));
                listers.remove(index);
            }
            Err(error) => return Err(error),
        }
    }
    let (_, expected) = lists.first().context("nothing lists processes")?;
    ensure!(!expected.is_empty(), "the guest has no processes");
    ui::say(&format!("  {} processes", expected.len()));
    for (what, found) in &lists {
        let different = found.symmetric_difference(expected).count();
        // The running guest's kernel starts and ends threads of its own.
        ensure!(
            different <= expected.len() / 20,
            "{what} lists {found:?}, and it should be {expected:?}"
        );
    }
    Ok(())
}

/// `kvmmem dump` with its SHA-256, against QEMU's own dump: of the guest as it is, and once all its
/// memory is allocated, which QEMU's dump does.
fn dumps(subject: &Subject<'_>, folder: &Path, rounds: u32) -> Result<Vec<Row>> {
    let Some(live) = subject.live() else { return Ok(Vec::new()) };
    let mut monitor = Monitor::connect(&live.second_monitor())?;
    let file = folder.join("dump");
    let measure = |dump: &mut dyn FnMut() -> Result<()>| {
        let mut times = Vec::new();
        for _ in 0..rounds {
            ensure!(!interrupt::was_seen(), "interrupted");
            let began = Instant::now();
            dump()?;
            times.push(nanoseconds(began));
            fs::remove_file(&file)?;
        }
        Ok(times)
    };
    let mut ours = || {
        let record = folder.join("dump.json");
        let words = ["dump", "--format", "elf", "--target", subject::NAME, "--record"];
        subject.kvmmem().args(words).arg(&record).arg(&file).run()?;
        Ok(fs::remove_file(&record)?)
    };
    let (sparse, peer, whole) = ui::step("answers: dumps", || {
        let sparse = measure(&mut ours)?;
        let peer = measure(&mut || qmp::dump_guest_memory(&mut monitor, &file))?;
        Ok((sparse, peer, measure(&mut ours)?))
    })?;
    let name = format!("dump of {} MiB with SHA-256, against dump-guest-memory", subject::MEMORY);
    let all = "the same, all memory allocated".to_owned();
    Ok(vec![Row::faster(name, DUMP, &sparse, &peer)?, Row::faster(all, DUMP, &whole, &peer)?])
}
