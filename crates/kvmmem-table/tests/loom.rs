// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The sequences of [`kvmmem_table::ops`] under every interleaving of a few threads: MAP, UNMAP,
//! closing a file and the death of the process racing for one page. No page is given back twice,
//! none while the host still shows the target's memory there, none is lost.
//!
//! `RUSTFLAGS="--cfg loom" cargo test -p kvmmem-table --release loom`
#![cfg(loom)]

mod common;

use std::collections::BTreeMap;

use common::Trees;
use kvmmem_table::ops::{self, Page, Shared};
use kvmmem_table::record::{ReserveError, UnmapError};
use kvmmem_table::table::Table;
use loom::sync::{Arc, Mutex};
use loom::thread;

const GVA: u64 = 0x7000;
const FILE_A: u64 = 1;
const FILE_B: u64 = 2;

/// What the host and the allocator think of each page.
#[derive(Default)]
struct World {
    pages: BTreeMap<u32, Place>,
    refusals_left: u32,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Replaced,
    GivenBack,
}

/// A page of the test. Dropping it does nothing: a page that is lost stays `Replaced` in the world.
struct TestPage {
    number: u32,
    world: Arc<Mutex<World>>,
}

impl Page for TestPage {
    fn undo(self) -> Result<(), Self> {
        let mut world = self.world.lock().unwrap();
        let place = world.pages.get(&self.number).copied();
        assert_eq!(place, Some(Place::Replaced), "page {} was undone twice", self.number);
        if world.refusals_left > 0 {
            world.refusals_left -= 1;
            drop(world);
            return Err(self);
        }
        world.pages.insert(self.number, Place::GivenBack);
        Ok(())
    }
}

/// A process with two open files.
struct Process {
    table: Mutex<Table<TestPage, Trees>>,
    world: Arc<Mutex<World>>,
}

impl Shared for Process {
    type Page = TestPage;
    type Maps = Trees;

    fn with<R>(&self, transition: impl FnOnce(&mut Table<TestPage, Trees>) -> R) -> R {
        transition(&mut self.table.lock().unwrap())
    }
}

impl Process {
    fn new(refusals: u32) -> Arc<Self> {
        let world = World { pages: BTreeMap::new(), refusals_left: refusals };
        let process = Self { table: Mutex::default(), world: Arc::new(Mutex::new(world)) };
        process.with(|table| {
            table.open((), FILE_A, 2);
            table.open((), FILE_B, 2);
        });
        Arc::new(process)
    }

    /// MAP; the page's number is the thread's.
    fn map(&self, file: u64, number: u32) -> Result<(), ReserveError> {
        ops::map(self, (), GVA, file, || {
            let replaced = self.world.lock().unwrap().pages.insert(number, Place::Replaced);
            assert_eq!(replaced, None);
            Ok(TestPage { number, world: self.world.clone() })
        })
    }

    fn unmap(&self) -> Result<(), UnmapError> {
        ops::unmap(self, GVA)
    }

    /// After all threads: `in_table` pages are still replaced, and UNMAP gets exactly these back.
    fn check(&self, in_table: usize) {
        let count =
            |place| self.world.lock().unwrap().pages.values().filter(|p| **p == place).count();
        assert_eq!(count(Place::Replaced), in_table);
        assert_eq!(self.unmap(), if in_table == 1 { Ok(()) } else { Err(UnmapError::NotMapped) });
        assert_eq!(count(Place::Replaced), 0);
    }
}

fn spawn<R: 'static>(
    process: &Arc<Process>,
    run: impl FnOnce(&Process) -> R + 'static,
) -> thread::JoinHandle<R> {
    let process = process.clone();
    thread::spawn(move || run(&process))
}

#[test]
fn loom_two_maps_of_one_gva() {
    loom::model(|| {
        let process = Process::new(0);
        let other = spawn(&process, |process| process.map(FILE_B, 2));
        let mine = process.map(FILE_A, 1);
        let other = other.join().unwrap();
        assert!(matches!(
            (mine, other),
            (Ok(()), Err(ReserveError::InUse)) | (Err(ReserveError::InUse), Ok(()))
        ));
        process.check(1);
    });
}

#[test]
fn loom_map_races_with_unmap() {
    loom::model(|| {
        let process = Process::new(0);
        let unmap = spawn(&process, Process::unmap);
        assert_eq!(process.map(FILE_A, 1), Ok(()));
        match unmap.join().unwrap() {
            Ok(()) => process.check(0),
            Err(UnmapError::NotMapped | UnmapError::Busy) => process.check(1),
            Err(UnmapError::Refused) => panic!("the host refuses nothing here"),
        }
    });
}

#[test]
fn loom_two_unmaps_and_a_new_map() {
    loom::model(|| {
        let process = Process::new(0);
        process.map(FILE_A, 1).unwrap();
        let unmap = spawn(&process, Process::unmap);
        let map = spawn(&process, |process| process.map(FILE_B, 2));
        let mine = process.unmap();
        let (unmap, map) = (unmap.join().unwrap(), map.join().unwrap());
        let unmaps = usize::from(mine.is_ok()) + usize::from(unmap.is_ok());
        let maps = 1 + usize::from(map.is_ok());
        process.check(maps - unmaps);
    });
}

#[test]
fn loom_unmap_through_one_file_races_with_closing_the_other() {
    loom::model(|| {
        let process = Process::new(0);
        process.map(FILE_A, 1).unwrap();
        let unmap = spawn(&process, Process::unmap);
        ops::close(&*process, FILE_A);
        assert!(matches!(
            unmap.join().unwrap(),
            Ok(()) | Err(UnmapError::NotMapped | UnmapError::Busy)
        ));
        process.check(0);
        assert_eq!(process.with(|table| table.usage(FILE_A)), None);
    });
}

#[test]
fn loom_closing_one_file_spares_the_other() {
    loom::model(|| {
        let process = Process::new(0);
        let close = spawn(&process, |process| ops::close(process, FILE_A));
        assert_eq!(process.map(FILE_B, 1), Ok(()));
        close.join().unwrap();
        process.check(1);
    });
}

#[test]
fn loom_map_unmap_and_close_of_one_file() {
    loom::model(|| {
        let process = Process::new(0);
        let unmap = spawn(&process, Process::unmap);
        let close = spawn(&process, |process| ops::close(process, FILE_A));
        let map = process.map(FILE_A, 1);
        let _ = unmap.join().unwrap();
        close.join().unwrap();
        assert!(matches!(map, Ok(()) | Err(ReserveError::Closed)));
        process.check(0);
        assert_eq!(process.with(|table| table.usage(FILE_A)), None);
    });
}

#[test]
fn loom_death_races_with_closing_a_file_and_mapping() {
    loom::model(|| {
        let process = Process::new(0);
        process.map(FILE_A, 1).unwrap();
        let close = spawn(&process, |process| ops::close(process, FILE_A));
        let map = spawn(&process, |process| process.map(FILE_B, 2));
        ops::die(&*process);
        close.join().unwrap();
        let _ = map.join().unwrap();
        process.check(0);
    });
}

#[test]
fn loom_refused_undo_stays_with_one_thread() {
    loom::model(|| {
        let process = Process::new(1);
        process.map(FILE_A, 1).unwrap();
        let unmap = spawn(&process, Process::unmap);
        ops::close(&*process, FILE_A);
        let unmap = unmap.join().unwrap();
        // Either thread may be the one that is refused; the other may come in time to try again.
        let left = process.world.lock().unwrap().pages[&1] == Place::Replaced;
        assert!(!left || unmap != Ok(()), "UNMAP said done but the page is still the target's");
        process.check(usize::from(left));
        assert_eq!(process.with(|table| table.usage(FILE_A)), None);
    });
}
