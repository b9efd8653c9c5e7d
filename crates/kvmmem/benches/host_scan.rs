// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A search through 1 GiB of a target on the host, in place in a view's mapping, against a search
//! by a reader that copies with process_vm_readv from the VMM's memory, as other tools do.
//!
//! The mapping is made anew for each search, as by a tool that is started for it, or kept, as by
//! one that searches again and again. A third search goes through RAM that the VMM keeps to itself,
//! of which the broker makes copies. Prints a line for each; with `--json` an object.
#![deny(unsafe_code)]

mod host;

use host::{Host, NEEDLE, PIECE, RAM, Result, report, timed};
use kvmmem::search::{MaskedByte, PLACES, Probe};
use kvmmem::{Mapping, Range};
use memchr::memmem::Finder;

const ROUNDS: usize = 9;
/// Bytes that are mapped and looked at together.
const IN_PLACE: usize = 1 << 20;
const GOAL: f64 = 1.5;
/// What the broker copies goes through two processes.
const COPIED_GOAL: f64 = 0.5;

fn main() -> Result<()> {
    let Some(host) = Host::start()? else { return Ok(()) };
    let whole = Range { gpa: 0, len: RAM };
    let kept = host.shared.map(whole)?;
    let (mut anew, mut again, mut copies, mut theirs) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..=ROUNDS {
        let times = [
            timed(|| search_in_place(&host.shared.map(whole)?, true))?,
            timed(|| search_in_place(&kept, false))?,
            timed(|| search(|at, part| Ok(host.private.read_at(at, part)?)))?,
            timed(|| search(|at, part| host.read_process(at, part)))?,
        ];
        // The first round warms up.
        if round > 0 {
            for (series, time) in
                [&mut anew, &mut again, &mut copies, &mut theirs].into_iter().zip(times)
            {
                series.push(time);
            }
        }
    }
    report(
        "scan of 1 GiB on the host, mapped anew, against process_vm_readv",
        GOAL,
        &mut anew,
        &mut theirs,
    );
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

/// Looks at every piece where it is, and copies what may be the needle; it must be found once.
fn search_in_place(mapping: &Mapping, is_fresh: bool) -> Result<()> {
    let byte = |place: u8| {
        let value = NEEDLE.get(usize::from(place)).copied();
        value.map(|value| (MaskedByte { value, mask: 0xff }, place)).ok_or("the needle is shorter")
    };
    let (first, second, third) = (byte(0)?, byte(1)?, byte(23)?);
    let probe = Probe::new(first.0, second, third).ok_or("the needle's bytes are out of order")?;
    let mut found = 0;
    for piece in (0..RAM).step_by(IN_PLACE) {
        if is_fresh {
            mapping.populate(piece, IN_PLACE as u64);
        }
        let end = (piece + IN_PLACE as u64).min(RAM - probe.reach() as u64);
        let mut at = piece;
        while let Some(candidates) = mapping.find(&probe, at, end - at)? {
            for place in candidates.iter() {
                let mut copy = [0; NEEDLE.len()];
                mapping.read(place, &mut copy)?;
                found += u32::from(copy == *NEEDLE);
            }
            at = end.min(candidates.at + PLACES as u64);
        }
        if is_fresh {
            mapping.release(piece, IN_PLACE as u64);
        }
    }
    if found == 1 { Ok(()) } else { Err(format!("found {found} needles").into()) }
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
