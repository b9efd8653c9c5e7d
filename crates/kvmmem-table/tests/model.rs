// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The table against a simple model: random transitions of several threads on the tables of two
//! processes, each with three files, with a host that may refuse. Every answer and every counter
//! must be the model's, and every page must be in exactly one place.
#![cfg(not(loom))]

mod common;

use std::collections::{BTreeMap, BTreeSet};

use common::Trees;
use kvmmem_table::record::{Reservation, ReserveError, Undo, UnmapError, Usage};
use kvmmem_table::table::Table;
use proptest::prelude::*;

const FILES: u64 = 3;
const LIMIT: u64 = 4;

/// One step of some thread in one of the two processes.
#[derive(Clone, Debug)]
enum Step {
    Reserve { file: u64, gva: u64 },
    Commit { nth: usize },
    Abort { nth: usize },
    BeginUndo { gva: u64 },
    Finish { nth: usize },
    Refuse { nth: usize },
    Close { file: u64 },
    NextUndo { file: Option<u64>, from: u64 },
    Die,
}

fn step() -> impl Strategy<Value = Step> {
    let file = 0..FILES;
    // Few addresses, so that threads meet; the extremes, for the walks.
    let gva = prop_oneof![8 => (0..10u64).prop_map(|page| page << 12), 1 => Just(u64::MAX)];
    prop_oneof![
        8 => (file.clone(), gva.clone()).prop_map(|(file, gva)| Step::Reserve { file, gva }),
        7 => any::<usize>().prop_map(|nth| Step::Commit { nth }),
        1 => any::<usize>().prop_map(|nth| Step::Abort { nth }),
        5 => gva.clone().prop_map(|gva| Step::BeginUndo { gva }),
        4 => any::<usize>().prop_map(|nth| Step::Finish { nth }),
        2 => any::<usize>().prop_map(|nth| Step::Refuse { nth }),
        1 => file.clone().prop_map(|file| Step::Close { file }),
        2 => (proptest::option::of(file), gva).prop_map(|(file, from)| Step::NextUndo { file, from }),
        1 => Just(Step::Die),
    ]
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Is {
    Reserved,
    Mapped(u64),
    Unmapping,
    Quarantined(u64),
}

/// One process: the table, its model, and what its threads hold in their hands.
struct Process {
    table: Table<u64, Trees>,
    model: BTreeMap<u64, (u64, Is)>,
    closed: BTreeSet<u64>,
    dead: bool,
    reservations: Vec<Reservation>,
    undos: Vec<Undo<u64>>,
    next_page: u64,
    freed: BTreeSet<u64>,
}

impl Process {
    fn new() -> Self {
        let mut table = Table::default();
        for file in 0..FILES {
            table.open((), file, LIMIT);
        }
        Self {
            table,
            model: BTreeMap::new(),
            closed: BTreeSet::new(),
            dead: false,
            reservations: Vec::new(),
            undos: Vec::new(),
            next_page: 0,
            freed: BTreeSet::new(),
        }
    }

    fn records(&self, file: u64) -> u64 {
        self.model.values().filter(|(owner, _)| *owner == file).count() as u64
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Reserve { file, gva } => self.reserve(file, gva),
            Step::Commit { nth } => {
                let Some(reservation) = take(&mut self.reservations, nth) else { return };
                self.commit(reservation);
            }
            Step::Abort { nth } => {
                let Some(reservation) = take(&mut self.reservations, nth) else { return };
                let gva = self.reserved(&reservation);
                self.table.abort(reservation);
                self.model.remove(&gva);
            }
            Step::BeginUndo { gva } => self.begin_undo(gva),
            Step::Finish { nth } => {
                let Some(Undo { gva, page }) = take(&mut self.undos, nth) else { return };
                assert!(self.freed.insert(page), "page {page} was freed twice");
                self.table.finish(gva);
                self.model.remove(&gva);
            }
            Step::Refuse { nth } => {
                let Some(undo) = take(&mut self.undos, nth) else { return };
                let (owner, _) = self.model[&undo.gva];
                self.model.insert(undo.gva, (owner, Is::Quarantined(undo.page)));
                self.table.refuse(undo);
            }
            Step::Close { file } => {
                self.closed.insert(file);
                self.table.close(file);
            }
            Step::NextUndo { file, from } => self.next_undo(file, from),
            Step::Die => {
                self.dead = true;
                self.table.die();
            }
        }
    }

    fn reserve(&mut self, file: u64, gva: u64) {
        let expected = if self.dead || self.closed.contains(&file) {
            Err(ReserveError::Closed)
        } else if self.model.contains_key(&gva) {
            Err(ReserveError::InUse)
        } else if self.records(file) >= LIMIT {
            Err(ReserveError::OverLimit)
        } else {
            Ok(())
        };
        match self.table.reserve((), gva, file) {
            Ok(reservation) => {
                assert_eq!(expected, Ok(()));
                self.reservations.push(reservation);
                self.model.insert(gva, (file, Is::Reserved));
            }
            Err(error) => assert_eq!(expected, Err(error)),
        }
    }

    fn commit(&mut self, reservation: Reservation) {
        let gva = self.reserved(&reservation);
        let (owner, _) = self.model[&gva];
        let page = self.next_page;
        self.next_page += 1;
        let undo = self.table.commit(reservation, page);
        if self.dead || self.closed.contains(&owner) {
            let undo = undo.expect("a page committed too late comes back");
            assert_eq!((undo.gva, undo.page), (gva, page));
            self.undos.push(undo);
            self.model.insert(gva, (owner, Is::Unmapping));
        } else {
            assert_eq!(undo, None);
            self.model.insert(gva, (owner, Is::Mapped(page)));
        }
    }

    /// The GVA of a reservation, after a check that nothing else is there.
    fn reserved(&self, reservation: &Reservation) -> u64 {
        let gva = reservation.gva();
        assert!(
            self.reservations.iter().all(|other| other.gva() != gva),
            "two reservations of {gva:#x}"
        );
        assert_eq!(self.model[&gva].1, Is::Reserved);
        gva
    }

    fn begin_undo(&mut self, gva: u64) {
        let expected = match self.model.get(&gva) {
            None => Err(UnmapError::NotMapped),
            Some((_, Is::Mapped(page) | Is::Quarantined(page))) => Ok(*page),
            Some(_) => Err(UnmapError::Busy),
        };
        match self.table.begin_undo(gva) {
            Ok(undo) => {
                assert_eq!(expected, Ok(undo.page));
                self.handed_out(undo);
            }
            Err(error) => assert_eq!(expected, Err(error)),
        }
    }

    fn next_undo(&mut self, file: Option<u64>, from: u64) {
        let expected = self.model.range(from..).find_map(|(gva, (owner, is))| match is {
            Is::Mapped(page) | Is::Quarantined(page) if file.is_none_or(|file| file == *owner) => {
                Some((*gva, *page))
            }
            _ => None,
        });
        let undo = self.table.next_undo(file, from);
        assert_eq!(undo.as_ref().map(|undo| (undo.gva, undo.page)), expected);
        if let Some(undo) = undo {
            self.handed_out(undo);
        }
    }

    fn handed_out(&mut self, undo: Undo<u64>) {
        assert!(
            !self.freed.contains(&undo.page),
            "page {} was handed out after it was freed",
            undo.page
        );
        let (owner, _) = self.model[&undo.gva];
        self.model.insert(undo.gva, (owner, Is::Unmapping));
        self.undos.push(undo);
    }

    fn check(&self) {
        for file in 0..FILES {
            let records = self.records(file);
            let is_quarantined =
                |&&(owner, is): &&(u64, Is)| owner == file && matches!(is, Is::Quarantined(_));
            let quarantined = self.model.values().filter(is_quarantined).count() as u64;
            let expected = (!self.closed.contains(&file) || records > 0).then_some(Usage {
                mapped: records - quarantined,
                quarantined,
                limit: LIMIT,
            });
            assert_eq!(self.table.usage(file), expected);
        }
        // Every page is freed, in a record, or in one thread's hands.
        let mut places: Vec<u64> = self.freed.iter().copied().collect();
        places.extend(self.undos.iter().map(|undo| undo.page));
        places.extend(self.model.values().filter_map(|(_, is)| match is {
            Is::Mapped(page) | Is::Quarantined(page) => Some(*page),
            Is::Reserved | Is::Unmapping => None,
        }));
        places.sort_unstable();
        assert_eq!(places, (0..self.next_page).collect::<Vec<_>>());
    }
}

fn take<T>(items: &mut Vec<T>, nth: usize) -> Option<T> {
    (!items.is_empty()).then(|| items.swap_remove(nth % items.len()))
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn table_does_what_the_model_does(steps in prop::collection::vec((0..2usize, step()), 1..120)) {
        let mut processes = [Process::new(), Process::new()];
        for (process, step) in &steps {
            processes[*process].run(step);
            processes[*process].check();
        }
    }
}
