// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Attaching to one of 1,000 targets with 10,000 grants, against attaching to the only target of
//! another broker by the only grant; and the memory that the broker has for each of the 1,000 as
//! long as no client asks for it.
//!
//! Both brokers are `kvmmemd` processes, and all targets are connections to their sockets with a
//! memfd each. A time is the median of its percentile in each round.
//! Prints four lines; with `--json` one object each: name, ratio, goal, better, and p50_ns and
//! p99_ns of the crowd or bytes of a target.
#![deny(unsafe_code)]

mod memory;
mod workspace;

use std::hint::black_box;
use std::time::{Duration, Instant};

use kvmmem::host::HostLink;
use kvmmem_client::vmm::{Caller, ViewCounters, VmmLink};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CpuSet, sched_getcpu, sched_setaffinity};

use memory::Memory;
use workspace::Workspace;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const TARGETS: usize = 1_000;
const GRANTS: usize = 10_000;
/// How often each way in is timed in a round, at each broker. They take turns, so that other
/// load of the machine meets both.
const ROUND: usize = 200;
const ROUNDS: usize = 20;
/// The crowd's p99 by that of the only target's.
const GOAL: f64 = 2.0;
/// What an idle target may take, bytes.
const MEMORY_GOAL: f64 = 16_384.0;

fn main() -> Result<()> {
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    // One CPU for all: else the times are those of waking another CPU, or not, as the scheduler
    // likes.
    let mut cpu = CpuSet::new();
    cpu.set(sched_getcpu());
    sched_setaffinity(None, &cpu)?;

    let (mut lone, mut crowd) = (Workspace::open()?, Workspace::open()?);
    lone.fill(1)?;
    // A first target comes with what there is once.
    crowd.fill(1)?;
    crowd.wait_until_idle()?;
    let before = Memory::of(crowd.pid())?;
    crowd.fill(TARGETS - 1)?;
    crowd.wait_until_idle()?;
    let after = Memory::of(crowd.pid())?;
    lone.grant(1)?;
    crowd.grant(GRANTS)?;

    compare("broker-attach-vmm", (&lone, &crowd), ROUNDS, open_views)?;
    compare("broker-attach-vmm-first", (&lone, &crowd), ROUNDS / 2, open_first_view)?;
    compare("broker-attach-host", (&lone, &crowd), ROUNDS, open_host_view)?;
    let bytes = (after.bytes() - before.bytes()) / (TARGETS - 1) as f64;
    let ratio = bytes / MEMORY_GOAL;
    let each = (after - before).shared_by(TARGETS - 1);
    let name = "broker-idle-memory";
    if is_json() {
        println!(
            "{{\"name\":\"{name}\",\"ratio\":{ratio:.3},\"goal\":1,\"better\":\"lower\",\"bytes\":{bytes:.0}}}"
        );
    } else {
        println!(
            "{name}: {bytes:.0} bytes for each target ({each}); ratio {ratio:.2}, goal at most 1"
        );
    }
    Ok(())
}

/// Times an operation at both brokers, and prints how the crowd's p99 is to the only one's.
fn compare<'h, S: FnMut(usize) -> Result<u64>>(
    name: &str,
    (lone, crowd): (&'h Workspace, &'h Workspace),
    rounds: usize,
    begin: impl Fn(&'h Workspace) -> Result<S>,
) -> Result<()> {
    let (mut at_lone, mut at_crowd) = (begin(lone)?, begin(crowd)?);
    // This warms up, and meets each target for the first time.
    for n in 0..TARGETS {
        at_lone(n)?;
        at_crowd(n)?;
    }
    let (mut few, mut many) = (Percentiles::default(), Percentiles::default());
    for round in 0..rounds {
        let (mut one, mut other) = (Vec::new(), Vec::new());
        for n in 0..ROUND {
            one.push(at_lone(round * ROUND + n)?);
            other.push(at_crowd(round * ROUND + n)?);
        }
        few.add(one);
        many.add(other);
    }
    let ([lone_p50, lone_p99], [p50, p99]) = (few.medians(), many.medians());
    let ratio = p99 as f64 / lone_p99 as f64;
    if is_json() {
        println!(
            "{{\"name\":\"{name}\",\"ratio\":{ratio:.3},\"goal\":{GOAL},\"better\":\"lower\",\"p50_ns\":{p50},\"p99_ns\":{p99}}}"
        );
    } else {
        println!(
            "{name}: p50 {p50} ns, p99 {p99} ns; of one target p50 {lone_p50} ns, p99 {lone_p99} ns; ratio {ratio:.2}, goal at most {GOAL}"
        );
    }
    Ok(())
}

/// Views of a VMM that goes on, as an introspector's does.
fn open_views(workspace: &Workspace) -> Result<impl FnMut(usize) -> Result<u64> + use<'_>> {
    let link = workspace.introspector("views")?;
    Ok(move |n| open_view(workspace, &link, n))
}

/// The first view of a VMM: the target's memfd comes with it.
fn open_first_view(workspace: &Workspace) -> Result<impl FnMut(usize) -> Result<u64> + use<'_>> {
    Ok(move |n| open_view(workspace, &workspace.introspector("first")?, n))
}

fn open_view(workspace: &Workspace, link: &VmmLink, n: usize) -> Result<u64> {
    let (token, caller) = (workspace.token(n), Caller { pid: 1, uid: 0, comm: "bench".into() });
    let began = Instant::now();
    let view = link.attach(token, &caller, true)?;
    let took = began.elapsed();
    link.detached(view.view, ViewCounters::default());
    rest();
    Ok(u64::try_from(took.as_nanos())?)
}

/// Views of processes of the host, each by a connection of its own.
fn open_host_view(workspace: &Workspace) -> Result<impl FnMut(usize) -> Result<u64> + use<'_>> {
    Ok(move |n| {
        let began = Instant::now();
        let view = HostLink::attach(workspace.socket(), workspace.token(n), true)?;
        let took = began.elapsed();
        drop(black_box(view));
        rest();
        Ok(u64::try_from(took.as_nanos())?)
    })
}

/// Lets the broker close a view before the other one is timed.
fn rest() {
    std::thread::sleep(Duration::from_micros(100));
}

/// p50 and p99 of each round.
#[derive(Default)]
struct Percentiles([Vec<u64>; 2]);

impl Percentiles {
    fn add(&mut self, mut times: Vec<u64>) {
        times.sort_unstable();
        for (all, percent) in self.0.iter_mut().zip([50, 99]) {
            all.extend(times.get(times.len() * percent / 100));
        }
    }

    /// Those of the round in the middle: what disturbs the machine for a while meets some rounds,
    /// not all.
    fn medians(mut self) -> [u64; 2] {
        self.0.each_mut().map(|all| {
            all.sort_unstable();
            all.get(all.len() / 2).copied().unwrap_or(0)
        })
    }
}

fn is_json() -> bool {
    std::env::args().any(|argument| argument == "--json")
}
