// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `kvmmem scan` as a user runs it, from its start to its end, against what the machine can do in
//! the same time: a plain sweep by AVX2 loads of a fresh mapping of the same memory, with as many
//! threads; and the same of a dump file. With rules, against the same engine on the same bytes in
//! this process's own memory, with one thread; the goal is the number of threads.
//!
//! Prints a line for each; with `--json` an object. `--size MIB` sets the amount of memory
//! [default: 1024].
#![deny(unsafe_code)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::error::Error;
use std::process::Command;
use std::time::Instant;

use kvmmem_client::vmm::Region;

use common::{Host, finish};
use kvmmem::{Access, Range, Token, View};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const ROUNDS: usize = 9;
const GOAL: f64 = 0.8;
const PIECE: usize = 2 << 20;
/// The memory's last bytes, and there alone, so that a search goes through everything.
const NEEDLE: &[u8; 24] = b"kvmmem looks for exactly";

const RULES: &str = r#"
rule needle { strings: $a = "kvmmem looks for exactly" condition: $a }
rule mail { strings: $a = /[a-z]{3,20}@[a-z]{3,20}\.example/ nocase condition: #a > 2 }
rule code { strings: $a = { 48 89 ?? 24 18 48 89 ?? 24 20 57 } $b = { e8 ?? ?? ?? ?? 85 c0 0f 84 } condition: all of them }
rule wide { strings: $a = "password=" wide ascii nocase $b = "secret" fullword condition: any of them }
"#;

/// A measurement, and how fast the floor was in the same rounds.
struct Line {
    name: String,
    goal: f64,
    ours: Vec<u64>,
    floor: Vec<u64>,
}

fn main() -> Result<()> {
    let words: Vec<String> = std::env::args().collect();
    let size = words.iter().position(|word| word == "--size").and_then(|at| words.get(at + 1));
    let len = size.map_or(Ok(1024), |size| size.parse::<u64>())? << 20;
    let host = Host::start(&[Region { gpa: 0, len, offset: 0, file: 0 }]);
    fill(&host, len)?;
    let rules = host.path("rules.yar");
    std::fs::write(&rules, RULES)?;
    let rules = rules.to_str().ok_or("no path")?;
    let needle = std::str::from_utf8(NEEDLE)?;
    let mut lines = Vec::new();
    for threads in [1, 2, 16] {
        let name = format!("scan of {} MiB, {threads} threads, against a sweep", len >> 20);
        let mut line = Line { name, goal: GOAL, ours: Vec::new(), floor: Vec::new() };
        // The first round warms up.
        for round in 0..=ROUNDS {
            let ours = scan(&host, &["--text", needle], threads)?;
            let floor = sweep(&host, len, threads)?;
            if round > 0 {
                line.ours.push(ours);
                line.floor.push(floor);
            }
        }
        lines.push(line);
    }
    let dump = host.path("dump.raw");
    let dump = dump.to_str().ok_or("no path")?;
    let dumped = host.look(&[], &["dump", dump, "--no-hash"]);
    if dumped.code != Some(0) {
        return Err(format!("dump: {:?}, {}", dumped.code, dumped.stderr).into());
    }
    for threads in [1, 2] {
        let name =
            format!("scan of a dump of {} MiB, {threads} threads, against a sweep", len >> 20);
        let mut line = Line { name, goal: GOAL, ours: Vec::new(), floor: Vec::new() };
        for round in 0..=ROUNDS {
            let words = ["scan", "--threads", &threads.to_string(), "--file", dump];
            let ours = timed(host.command(&words), &["--text", needle])?;
            let floor = sweep(&host, len, threads)?;
            if round > 0 {
                line.ours.push(ours);
                line.floor.push(floor);
            }
        }
        lines.push(line);
    }
    if cfg!(feature = "yara") {
        let memory = copy(&host, len)?;
        for threads in [1, 2] {
            let name = format!(
                "scan of {} MiB by rules, {threads} threads, against the engine",
                len >> 20
            );
            let goal = f64::from(u8::try_from(threads)?);
            let mut line = Line { name, goal, ours: Vec::new(), floor: Vec::new() };
            for _ in 0..ROUNDS / 2 {
                line.ours.push(scan(&host, &["--yara", rules], threads)?);
                line.floor.push(engine(&memory)?);
            }
            lines.push(line);
        }
    }
    lines.iter_mut().for_each(Line::report);
    Ok(())
}

/// Makes every page hold something else, as those of a machine at work.
fn fill(host: &Host, len: u64) -> Result<()> {
    let mut state = 1u64;
    let mut piece = vec![0u8; PIECE];
    for at in (0..len).step_by(PIECE) {
        for word in piece.as_chunks_mut::<8>().0 {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            // Half of it text.
            let text = if state >> 63 == 0 { 0x2020_2020_2020_2020 } else { u64::MAX };
            *word = (state & 0x5f5f_5f5f_5f5f_5f5f | text & 0x2020_2020_2020_2020).to_le_bytes();
        }
        rustix::io::pwrite(host.ram.fd(), &piece, at)?;
    }
    rustix::io::pwrite(host.ram.fd(), NEEDLE, len - NEEDLE.len() as u64)?;
    Ok(())
}

/// The time that a scan of the target takes.
fn scan(host: &Host, what: &[&str], threads: usize) -> Result<u64> {
    let (_, token) = host.grant(&[]);
    timed(host.view(&token, &["scan", "--threads", &threads.to_string()]), what)
}

/// The time that the command takes; it must find the needle alone.
fn timed(mut command: Command, what: &[&str]) -> Result<u64> {
    let began = Instant::now();
    let ended = finish(command.args(what).spawn()?);
    let time = nanoseconds(began)?;
    match (ended.code, ended.stdout.lines().count()) {
        (Some(0), 1) => Ok(time),
        _ => Err(format!("scan: {:?}, {}{}", ended.code, ended.stdout, ended.stderr).into()),
    }
}

/// The time of mapping everything anew and loading each byte once.
fn sweep(host: &Host, len: u64, threads: usize) -> Result<u64> {
    let (_, token) = host.grant(&[]);
    let view =
        View::attach_host(&host.path("broker.sock"), &token.parse::<Token>()?, Access::ReadOnly)?;
    let began = Instant::now();
    let mapping = view.map(Range { gpa: 0, len })?;
    let share = len.div_ceil(threads as u64).next_multiple_of(PIECE as u64);
    std::thread::scope(|scope| {
        let sweep = |from: u64| {
            let part = usize::try_from(share.min(len - from.min(len))).ok()?;
            mapping.sweep(from.min(len), part).ok().flatten()
        };
        let threads: Vec<_> =
            (0..threads as u64).map(|number| scope.spawn(move || sweep(number * share))).collect();
        threads.into_iter().all(|thread| thread.join().ok().flatten().is_some())
    })
    .then_some(())
    .ok_or("no AVX2, or the memory is gone")?;
    nanoseconds(began)
}

fn copy(host: &Host, len: u64) -> Result<Vec<u8>> {
    let mut memory = vec![0; usize::try_from(len)?];
    let mut done = 0;
    while let Some(rest) = memory.get_mut(done..).filter(|rest| !rest.is_empty()) {
        done += rustix::io::pread(host.ram.fd(), rest, done as u64)?;
    }
    Ok(memory)
}

/// The time of the engine alone.
#[cfg(feature = "yara")]
fn engine(memory: &[u8]) -> Result<u64> {
    let mut compiler = boreal::Compiler::new();
    compiler.add_rules_str(RULES)?;
    let mut scanner = compiler.finalize();
    scanner.set_scan_params(boreal::scanner::ScanParams::default().compute_full_matches(true));
    let began = Instant::now();
    let found = scanner.scan_mem(memory).map_err(|(error, _)| error)?;
    if found.rules.len() == 1 {
        nanoseconds(began)
    } else {
        Err("the engine finds something else".into())
    }
}

#[cfg(not(feature = "yara"))]
fn engine(_: &[u8]) -> Result<u64> {
    Err("built without rules".into())
}

fn nanoseconds(began: Instant) -> Result<u64> {
    Ok(u64::try_from(began.elapsed().as_nanos())?)
}

impl Line {
    /// Prints how many times as fast as the floor it is.
    fn report(&mut self) {
        let percentile = |times: &mut Vec<u64>, percent: usize| {
            times.sort_unstable();
            times.get(times.len() * percent / 100).copied().unwrap_or(0)
        };
        let [p50, p99] = [50, 99].map(|percent| percentile(&mut self.ours, percent));
        let [floor, floor_p99] = [50, 99].map(|percent| percentile(&mut self.floor, percent));
        let ratio = floor as f64 / p50 as f64;
        let (name, goal) = (&self.name, self.goal);
        if std::env::args().any(|argument| argument == "--json") {
            println!(
                "{{\"name\":\"{name}\",\"ratio\":{ratio:.3},\"goal\":{goal},\"better\":\"higher\",\"p50_ns\":{p50},\"p99_ns\":{p99},\"floor_p50_ns\":{floor},\"floor_p99_ns\":{floor_p99}}}"
            );
        } else {
            println!(
                "{name}: p50 {p50} ns, p99 {p99} ns; floor p50 {floor} ns, p99 {floor_p99} ns; {ratio:.2}, goal {goal}"
            );
        }
    }
}
