// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A search through 1 GiB of a target on the host, through a view's mapping, against the same search by a reader that
//! copies with process_vm_readv from the VMM's memory, as other tools do.
//!
//! The mapping is made anew for each search, as by a tool that is started for it, or kept, as by one that searches again
//! and again. A third search goes through RAM that the VMM keeps to itself, of which the broker makes copies. Prints a
//! line for each; with `--json` an object.
#![deny(unsafe_code)]

mod host;

use host::{Host, NEEDLE, PIECE, RAM, Result, report, timed};
use kvmmem::{Mapping, Range};
use memchr::memmem::Finder;

const ROUNDS: usize = 9;
const GOAL: f64 = 1.5;
/// What the broker copies goes through two processes.
const COPIED_GOAL: f64 = 0.5;

fn main() -> Result<()> {
    let Some(host) = Host::start()? else { return Ok(()) };
    let whole = Range { gpa: 0, len: RAM };
    let kept = host.shared.map(whole)?;
    let (mut anew, mut again, mut copies, mut theirs) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let times = [
            timed(|| {
                let mapping = host.shared.map(whole)?;
                search(|at, part| read_mapping(&mapping, at, part))
            })?,
            timed(|| search(|at, part| read_mapping(&kept, at, part)))?,
            timed(|| search(|at, part| Ok(host.private.read_at(at, part)?)))?,
            timed(|| search(|at, part| host.read_process(at, part)))?,
        ];
        // The first round warms up.
        if round > 0 {
            for (series, time) in [&mut anew, &mut again, &mut copies, &mut theirs].into_iter().zip(times) {
                series.push(time);
            }
        }
    }
    report("scan of 1 GiB on the host, mapped anew, against process_vm_readv", GOAL, &mut anew, &mut theirs);
    report(
        "scan of 1 GiB on the host, mapping kept, against process_vm_readv",
        GOAL,
        &mut again,
        &mut theirs,
    );
    report(
        "scan of 1 GiB of private RAM on the host, against process_vm_readv",
        COPIED_GOAL,
        &mut copies,
        &mut theirs,
    );
    Ok(())
}

fn read_mapping(mapping: &Mapping, at: u64, part: &mut [u8]) -> Result<()> {
    Ok(mapping.read(at, part)?)
}

/// Copies and searches every piece; the needle must be found once.
fn search(read: impl Fn(u64, &mut [u8]) -> Result<()>) -> Result<()> {
    let finder = Finder::new(NEEDLE);
    let mut piece = vec![0; PIECE];
    let mut found = 0;
    for at in (0..RAM).step_by(PIECE) {
        read(at, &mut piece)?;
        found += finder.find_iter(&piece).count();
    }
    if found == 1 { Ok(()) } else { Err(format!("found {found} needles").into()) }
}
