// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Listings of many processes that share what they have: a few structures name any amount of it.

mod common;

use common::areas::{self, MM, NODE, NODES};
use common::fs::{self, FDS, FDTABLE};
use common::{Guest, NAMES, Place, btf, processes};
use kvmmem_linux::files::{Files, OpenFile};
use kvmmem_linux::maps::{Mapping, Maps};
use kvmmem_linux::process::Details;
use kvmmem_linux::tasks::{Tasks, Which};
use kvmmem_linux::{Find, Kernel, KernelError};

const PLACE: Place = Place::FIRST;

fn kernel(guest: &Guest) -> Kernel<'_> {
    Kernel::find(guest, Find { note: Some(PLACE.note), ..Find::default() }).unwrap()
}

/// How many processes were listed before there was too much.
fn until_too_much<T>(list: impl Fn() -> Result<T, KernelError>) -> usize {
    let errors = (0..10_000).map(|_| list().err());
    let (count, error) = errors.enumerate().find(|(_, error)| error.is_some()).unwrap();
    assert!(matches!(error, Some(KernelError::TooMuch { .. })), "{error:?}");
    count
}

#[test]
fn files_that_processes_share_have_a_limit() {
    const LIMIT: usize = 100_000;
    let guest = fs::guest(&PLACE);
    let files = |guest: &Guest| {
        let kernel = kernel(guest);
        let files = Files::new(&kernel).unwrap().with_limit(LIMIT);
        until_too_much(|| files.of(&fs::task(&PLACE)))
    };
    let most = LIMIT / (3 * size_of::<OpenFile>());
    assert!((most / 2..most).contains(&files(&guest)));
    // A path through many mounts, which add nothing to it.
    const MOUNTS: u64 = 400;
    for number in 3..MOUNTS {
        let at = PLACE.gpa + fs::mount(number);
        let words = [fs::mount(number - 1), fs::dentry(0), fs::dentry(0)];
        guest.put(at, &words.map(|to| (PLACE.gva + to).to_le_bytes()).concat());
    }
    guest.put_word(PLACE.gpa + fs::file(0), PLACE.gva + fs::mount(MOUNTS - 1) + fs::VFSMOUNT);
    assert!(files(&guest) <= LIMIT / 400);
    // None of them can be read.
    [0, 2, 3].into_iter().for_each(|fd| guest.put_word(PLACE.gpa + FDS + 8 * fd, 0x1000));
    assert!((most / 2..=most).contains(&files(&guest)));
    // Descriptors without a file.
    guest.put(PLACE.gpa + FDS, &[0; 64]);
    guest.put(PLACE.gpa + FDTABLE, &512_u32.to_le_bytes());
    assert!((LIMIT / 128..=LIMIT / 64).contains(&files(&guest)));
}

#[test]
fn mappings_that_processes_share_have_a_limit() {
    const LIMIT: usize = 100_000;
    let maps = |guest: &Guest| {
        let kernel = kernel(guest);
        let maps = Maps::new(&kernel).unwrap().with_limit(LIMIT);
        until_too_much(|| maps.of(&areas::task(&PLACE)))
    };
    let ranges: Vec<_> = (16..36_u64).map(|page| (page << 13, (page << 13) + 0x1000)).collect();
    let most = LIMIT / (20 * size_of::<Mapping>());
    let guest = Guest::with(&[PLACE]);
    guest.areas(&PLACE, &ranges, 16);
    // They change whenever they are read: what is read again is not kept.
    for count in [20_u32, 21] {
        guest.put(PLACE.gpa + MM + 16, &count.to_le_bytes());
        assert!((most / 2..=most).contains(&maps(&guest)), "{count}");
    }
    guest.put(PLACE.gpa + common::BTF, &btf::with_areas(false));
    guest.first_of_list(&PLACE, areas::area(&PLACE, 0));
    assert!((most / 2..=most).contains(&maps(&guest)));
    // A tree of nodes without an area.
    let guest = Guest::with(&[PLACE]);
    guest.areas(&PLACE, &ranges, 16);
    let leaf = |number: u64| (PLACE.gva + NODES + NODE * number) | 1 << 3 | 6;
    guest.node(PLACE.gpa + NODES, 3, &[(leaf(1), 0xffff), (leaf(2), u64::MAX)]);
    guest.node(PLACE.gpa + NODES + NODE, 1, &[(0, 0xffff)]);
    guest.node(PLACE.gpa + NODES + 2 * NODE, 1, &[(0, u64::MAX)]);
    guest.put_word(PLACE.gpa + MM + 8, (PLACE.gva + NODES) | 3 << 3 | 2);
    assert!(maps(&guest) < 10_000);
}

#[test]
fn threads_that_processes_share_have_a_limit() {
    let guest = processes::guest();
    processes::share_threads(&guest, 5);
    let kernel = kernel(&guest);
    let list = |nodes| Tasks::with_limits(&kernel, Which::Threads, nodes, 0).unwrap();
    let leaders = NAMES.len() - 1;
    let all: Vec<_> = list(leaders * 6).collect::<Result<_, _>>().unwrap();
    assert_eq!(all.len(), leaders * 6);
    let mut cut: Vec<_> = list(leaders * 6 - 1).collect();
    assert!(matches!(cut.pop(), Some(Err(KernelError::TooMuch { .. }))));
    assert_eq!(cut.into_iter().filter_map(Result::ok).count(), leaders * 6 - 1);
    // None of them is a task.
    (0..5).for_each(|n| {
        let at = PLACE.gpa + processes::thread(n) + processes::PID;
        guest.put(at, &[0; 4]);
    });
    let all: Vec<_> = list(leaders * 6).collect();
    assert!(all.iter().filter(|task| task.is_err()).count() == leaders * 5);
    assert!(matches!(list(10).last(), Some(Err(KernelError::TooMuch { .. }))));
}

/// Command lines of empty words, which processes share.
#[test]
fn words_of_command_lines_have_a_limit() {
    const LIMIT: usize = 100_000;
    let guest = processes::guest();
    processes::share_memory(&guest, 0x1000);
    let kernel = kernel(&guest);
    let tasks = Tasks::with_limits(&kernel, Which::Processes, 100, LIMIT as u64).unwrap();
    let args: Vec<_> = tasks.map(|task| task.unwrap().args).collect();
    assert_eq!(args[0].words.len(), 0x1000);
    assert!(args[1].is_cut && args[2].is_cut);
    let words: usize = args.iter().map(|args| args.words.len()).sum();
    assert!(words <= 2 * LIMIT / size_of::<String>(), "{words}");
}

#[test]
fn programs_and_environments_that_processes_share_have_a_limit() {
    const LIMIT: usize = 100_000;
    let guest = fs::guest(&PLACE);
    let kernel = kernel(&guest);
    let details = || Details::new(&kernel).unwrap().with_limit(LIMIT);
    let task = fs::task(&PLACE);
    let program = details().executable(&task).unwrap().unwrap().text;
    let (details, most) = (details(), LIMIT / program.len());
    assert!(most < 20_000);
    assert_eq!((0..most + 1).find(|_| details.executable(&task).is_err()), Some(most));
    // 64 bytes of them, most of which are empty words.
    let details = Details::new(&kernel).unwrap().with_limit(LIMIT);
    let words = details.environment(&task).unwrap().words.len();
    assert!(words > 10);
    let most = LIMIT / (words * size_of::<String>());
    assert!((most / 2..=most).contains(&(1 + until_too_much(|| details.environment(&task)))));
}
