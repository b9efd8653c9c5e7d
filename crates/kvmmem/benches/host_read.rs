// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Reads of 4 KiB here and there in 1 GiB of a target on the host, one at a time and 512 in a call,
//! against process_vm_readv from the VMM's memory, as other tools do. Prints a line for each; with
//! `--json` an object.
//!
//! Most lines read the same 512 pages again and again, which stay in the CPU's caches. The lines of
//! other pages read through all of the RAM, as a tool does that looks at each page once.
#![deny(unsafe_code)]

mod host;

use std::io::IoSliceMut;

use host::{Host, RAM, Result, report, timed};
use kvmmem::View;
use nix::sys::uio::{RemoteIoVec, process_vm_readv};

const PAGE: usize = 4096;
const BATCH: usize = 512;
const ROW: usize = 32;
const ROUNDS: usize = 400;
const WARM_UP: usize = 20;

/// What is measured, and how many times as fast as the peer it should be.
const LINES: [(&str, f64); 7] = [
    ("4 KiB of private RAM, read_at, against process_vm_readv", 0.5),
    ("512 x 4 KiB of private RAM, read_vectored, against one process_vm_readv", 0.8),
    ("4 KiB of private RAM, other pages, read_at, against process_vm_readv", 0.5),
    ("512 x 4 KiB of private RAM, other pages, read_vectored, against one process_vm_readv", 0.8),
    ("4 KiB of shared RAM, read_at, against process_vm_readv", 1.0),
    ("512 x 4 KiB of shared RAM, read_at, against one process_vm_readv", 0.9),
    ("512 x 4 KiB of shared RAM, read_vectored, against one process_vm_readv", 1.5),
];

fn main() -> Result<()> {
    let Some(host) = Host::start()? else { return Ok(()) };
    // Of the pages in an order in which neighbours are far apart, the batch with a number.
    let batch = |number: usize| -> Vec<u64> {
        let first = (number * BATCH) as u64;
        (first..first + BATCH as u64).map(|n| n * 2_654_435_761 % (RAM / 4096) * 4096).collect()
    };
    let places = batch(0);
    let mut buffers = vec![0u8; BATCH * PAGE];
    let mut series: [Vec<u64>; 11] = Default::default();
    let mut add = |number: usize, time: u64, round: usize| {
        // The first rounds warm up.
        if let Some(series) = series.get_mut(number).filter(|_| round >= WARM_UP) {
            series.push(time);
        }
    };
    for round in 0..ROUNDS + WARM_UP {
        let page = buffers.get_mut(..PAGE).ok_or("no page")?;
        // Several in a row, as a tool reads that follows pointers; pages that the other ways have
        // not just read.
        let row =
            |way: usize| places.iter().cycle().skip((round * 3 + way) * ROW % BATCH).take(ROW);
        for place in row(0) {
            add(0, timed(|| Ok(host.private.read_at(*place, page)?))?, round);
        }
        for place in row(1) {
            add(1, timed(|| Ok(host.shared.read_at(*place, page)?))?, round);
        }
        for place in row(2) {
            add(2, timed(|| host.read_process(*place, page))?, round);
        }
        add(3, timed(|| vectored(&host.private, &places, &mut buffers))?, round);
        let each = timed(|| {
            let mut pieces = places.iter().zip(buffers.chunks_mut(PAGE));
            pieces.try_for_each(|(gpa, page)| host.shared.read_at(*gpa, page))?;
            Ok(())
        });
        add(4, each?, round);
        add(5, timed(|| vectored(&host.shared, &places, &mut buffers))?, round);
        add(6, timed(|| process(&host, &places, &mut buffers))?, round);
        let others = [0, 1, 2].map(|way| batch(round * 3 + way));
        let [singles, ours, theirs] = &others;
        let page = buffers.get_mut(..PAGE).ok_or("no page")?;
        for place in singles.iter().take(ROW) {
            add(7, timed(|| Ok(host.private.read_at(*place, page)?))?, round);
        }
        for place in singles.iter().skip(ROW).take(ROW) {
            add(8, timed(|| host.read_process(*place, page))?, round);
        }
        add(9, timed(|| vectored(&host.private, ours, &mut buffers))?, round);
        add(10, timed(|| process(&host, theirs, &mut buffers))?, round);
    }
    let [
        private,
        shared,
        process,
        private_batch,
        shared_each,
        shared_batch,
        process_batch,
        private_other,
        process_other,
        private_others,
        process_others,
    ] = &mut series;
    let pairs = [
        (private, &mut process.clone()),
        (private_batch, &mut process_batch.clone()),
        (private_other, process_other),
        (private_others, process_others),
        (shared, process),
        (shared_each, &mut process_batch.clone()),
        (shared_batch, process_batch),
    ];
    for ((name, goal), (ours, theirs)) in LINES.into_iter().zip(pairs) {
        report(name, goal, ours, theirs);
    }
    Ok(())
}

fn vectored(view: &View, places: &[u64], buffers: &mut [u8]) -> Result<()> {
    let mut pieces: Vec<(u64, &mut [u8])> =
        places.iter().copied().zip(buffers.chunks_mut(PAGE)).collect();
    Ok(view.read_vectored(&mut pieces)?)
}

/// The same in one call of the system.
fn process(host: &Host, places: &[u64], buffers: &mut [u8]) -> Result<()> {
    let mut local: Vec<IoSliceMut<'_>> = buffers.chunks_mut(PAGE).map(IoSliceMut::new).collect();
    let place =
        |at: &u64| Ok(RemoteIoVec { base: host.address + usize::try_from(*at)?, len: PAGE });
    let remote = places.iter().map(place).collect::<Result<Vec<_>>>()?;
    let count = process_vm_readv(host.pid, &mut local, &remote)?;
    if count == BATCH * PAGE { Ok(()) } else { Err("short read".into()) }
}
