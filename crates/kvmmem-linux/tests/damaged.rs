// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory with a damaged page: readable objects are listed, and the others are errors in their
//! places or marked.

mod common;

use common::fs::{self, FDS, FDTABLE, MOUNT_LIST, NAMESPACE, dentry, mount};
use common::objects::{self, EHASH, at, module, sock};
use common::processes::{self, COMM, CRED, USAGE, task};
use common::{Guest, Place};
use kvmmem_linux::files::{Files, OpenFiles};
use kvmmem_linux::modules::Modules;
use kvmmem_linux::mounts::{MountTable, Mounts};
use kvmmem_linux::sockets::Sockets;
use kvmmem_linux::tasks::{Tasks, Which};
use kvmmem_linux::{Find, Kernel, KernelError};
use kvmmem_memory::{Memory, MemoryError, Range};

const PLACE: Place = Place::FIRST;

/// A guest with missing pages, by their places in the image.
struct Holes<'g> {
    guest: &'g Guest,
    pages: Vec<u64>,
}

impl Memory for Holes<'_> {
    fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let (start, end) = (gpa & !0xfff, gpa + buf.len() as u64);
        let pages = (start..end).step_by(0x1000);
        match pages.clone().find(|page| self.pages.contains(&page.wrapping_sub(PLACE.gpa))) {
            Some(page) => Err(MemoryError::Hole { gpa: page.max(gpa) }),
            None => self.guest.read_at(gpa, buf),
        }
    }

    fn ranges(&self) -> Result<Vec<Range>, MemoryError> {
        self.guest.ranges()
    }
}

/// Hands `act` the kernel in memory without a page, then in memory whose page is zeros from `at`
/// on.
fn damaged(guest: impl Fn() -> Guest, at: u64, mut act: impl FnMut(&Kernel<'_>, &str)) {
    let find = Find { note: Some(PLACE.note), ..Find::default() };
    let sound = guest();
    let holes = Holes { guest: &sound, pages: vec![at & !0xfff] };
    act(&Kernel::find(&holes, find).unwrap(), "hole");
    let zeroed = guest();
    zeroed.put(PLACE.gpa + at, &vec![0; usize::try_from(0x1000 - at % 0x1000).unwrap()]);
    act(&Kernel::find(&zeroed, find).unwrap(), "zeros");
}

/// The names and marks of tasks, and the number of errors.
fn tasks(kernel: &Kernel<'_>) -> (Vec<(String, Option<u32>, bool)>, usize) {
    let all: Vec<_> = Tasks::new(kernel, Which::Processes).unwrap().collect();
    let lost = all.iter().filter(|task| task.is_err()).count();
    (all.into_iter().flatten().map(|task| (task.comm, task.uid, task.is_damaged)).collect(), lost)
}

#[test]
fn a_damaged_task_hides_no_other() {
    let row = |name: &str| (name.to_owned(), Some(1000), false);
    for (number, others) in [
        (1, ["kthreadd", "exactly15chars!"]),
        (2, ["init", "exactly15chars!"]),
        (3, ["init", "kthreadd"]),
    ] {
        damaged(processes::guest, task(number), |kernel, how| {
            assert_eq!(tasks(kernel), (others.map(row).to_vec(), 1), "{number} {how}");
        });
    }
    // Its pointers lead to other tasks, or to itself.
    for to in [task(1), task(2), task(3)] {
        let guest = processes::guest();
        guest.put_word(PLACE.gpa + task(2), PLACE.gva + to);
        let kernel = Kernel::find(&guest, Find::default()).unwrap();
        assert_eq!(
            tasks(&kernel),
            (["init", "kthreadd", "exactly15chars!"].map(row).to_vec(), 0),
            "{to:#x}"
        );
    }
}

#[test]
fn a_list_that_is_damaged_at_two_nodes_is_incomplete() {
    let guest = processes::guest();
    let holes = Holes { guest: &guest, pages: vec![task(1), task(2)] };
    let (found, lost) = tasks(&Kernel::find(&holes, Find::default()).unwrap());
    assert_eq!(found, [("exactly15chars!".to_owned(), Some(1000), false)]);
    assert!(lost >= 2, "{lost}");
}

#[test]
fn what_cannot_be_read_of_a_task_is_marked() {
    damaged(processes::guest, CRED, |kernel, how| {
        let (found, lost) = tasks(kernel);
        // Zeros are not the numbers of root.
        assert!(found.iter().all(|row| (row.1, row.2) == (None, true)), "{how}: {found:?}");
        assert_eq!((found.len(), lost), (3, 0));
    });
    // A task that nothing refers to is not listed by a kernel.
    let guest = processes::guest();
    guest.put(PLACE.gpa + task(2) + USAGE, &[0; 4]);
    let kernel = Kernel::find(&guest, Find::default()).unwrap();
    assert_eq!(tasks(&kernel).0[1], ("kthreadd".to_owned(), Some(1000), true));
    // A task without a name has one that was lost; the process of another is found.
    let guest = processes::guest();
    guest.put(PLACE.gpa + task(2) + COMM, &[0; 16]);
    let kernel = Kernel::find(&guest, Find::default()).unwrap();
    assert_eq!(tasks(&kernel).0[1], (String::new(), Some(1000), true));
    guest.put(PLACE.gpa + task(3), &[0; 0x100]);
    assert_eq!(kernel.task(1).unwrap().pid, 1);
    // It may be the damaged one.
    assert!(matches!(kernel.task(77), Err(KernelError::Malformed { .. })));
}

#[test]
fn a_damaged_module_hides_no_other() {
    let guest = objects::guest(&PLACE);
    guest.put(at(&PLACE, module(1)), &[0; 0x200]);
    let kernel = Kernel::find(&guest, Find::default()).unwrap();
    let all: Vec<_> = Modules::new(&kernel).unwrap().collect();
    assert_eq!(all.iter().filter(|module| module.is_err()).count(), 1);
    let names: Vec<_> = all.into_iter().flatten().map(|module| module.name).collect();
    assert_eq!(names, ["one", "three"]);
}

#[test]
fn a_damaged_socket_or_bucket_hides_no_other() {
    let read = |guest: &Guest| {
        let kernel =
            Kernel::find(guest, Find { note: Some(PLACE.note), ..Find::default() }).unwrap();
        let all: Vec<_> = Sockets::new(&kernel).unwrap().collect();
        let lost = all.iter().filter(|socket| socket.is_err()).count();
        let found: Vec<_> =
            all.into_iter().flatten().map(|socket| (socket.inode, socket.is_damaged)).collect();
        (found, lost)
    };
    let whole = read(&objects::guest(&PLACE)).0;
    assert_eq!(whole.len(), 9);
    // A socket with a bucket of its own; a bucket of zeros, which has no marker.
    for (at, len) in [(sock(1), 0x100), (EHASH + 8 * 5, 8)] {
        let guest = objects::guest(&PLACE);
        guest.put(objects::at(&PLACE, at), &vec![0; len]);
        let (found, lost) = read(&guest);
        let expected: Vec<_> = whole.iter().filter(|(inode, _)| *inode != 301).copied().collect();
        assert_eq!((found, lost), (expected, 1), "{at:#x}");
    }
    // Two unix sockets have the same address.
    let guest = objects::guest(&PLACE);
    guest.put(at(&PLACE, 0x6800), &[113]);
    let (found, lost) = read(&guest);
    assert_eq!((found.iter().filter(|(_, is_damaged)| *is_damaged).count(), lost), (2, 0));
}

fn files(kernel: &Kernel<'_>) -> Result<OpenFiles, KernelError> {
    Files::new(kernel)?.of(&fs::task(&PLACE))
}

/// Descriptor, path and whether it is damaged.
fn rows(open: &OpenFiles) -> Vec<(u32, &str, bool)> {
    open.files.iter().map(|file| (file.fd, file.path.text.as_str(), file.is_damaged)).collect()
}

const SOUND: [(u32, &str, bool); 3] =
    [(0, "/passwd", false), (2, "/data/table", false), (3, "/log/journal", false)];

#[test]
fn a_file_whose_path_is_damaged_is_marked() {
    let guest = fs::guest(&PLACE);
    let kernel = Kernel::find(&guest, Find::default()).unwrap();
    let open = files(&kernel).unwrap();
    assert_eq!((rows(&open), open.is_cut), (SOUND.to_vec(), false));
    let [first, _, last] = SOUND;
    for object in [fs::file(1), dentry(6), dentry(3), mount(1)] {
        damaged(
            || fs::guest(&PLACE),
            object,
            |kernel, how| {
                let open = files(kernel).unwrap();
                assert_eq!(
                    (rows(&open), open.is_cut),
                    (vec![first, (2, "", true), last], false),
                    "{object:#x} {how}"
                );
            },
        );
    }
    // A name that is shorter than the length in its entry.
    guest.put(PLACE.gpa + 0x20_b000 + 16 * 6 + 3, &[0]);
    assert_eq!(rows(&files(&kernel).unwrap()), [first, (2, "", true), last]);
}

#[test]
fn descriptors_that_are_damaged_are_told() {
    damaged(
        || fs::guest(&PLACE),
        FDS,
        |kernel, how| {
            let open = files(kernel).unwrap();
            assert_eq!((rows(&open), open.is_cut), (Vec::new(), true), "{how}");
        },
    );
    // One descriptor may be about to be opened.
    let guest = fs::guest(&PLACE);
    guest.put_word(PLACE.gpa + FDS + 16, 0);
    let kernel = Kernel::find(&guest, Find::default()).unwrap();
    let open = files(&kernel).unwrap();
    assert_eq!((rows(&open), open.is_cut), (vec![SOUND[0], SOUND[2]], false));
    guest.put(PLACE.gpa + FDTABLE, &[0; 4]);
    assert!(matches!(files(&kernel), Err(KernelError::Malformed { .. })), "an empty table");
}

fn mounts(kernel: &Kernel<'_>) -> Result<MountTable, KernelError> {
    Mounts::new(kernel)?.of(&fs::task(&PLACE))
}

fn points(table: &MountTable) -> Vec<(u32, &str)> {
    table.mounts.iter().map(|mount| (mount.id, mount.point.as_str())).collect()
}

#[test]
fn a_damaged_mount_hides_no_other() {
    let guest = fs::guest(&PLACE);
    let kernel = Kernel::find(&guest, Find::default()).unwrap();
    let table = mounts(&kernel).unwrap();
    assert_eq!((points(&table), table.lost), (vec![(21, "/"), (22, "/data"), (23, "/log")], 0));
    for object in [mount(1), dentry(3)] {
        damaged(
            || fs::guest(&PLACE),
            object,
            |kernel, how| {
                let table = mounts(kernel).unwrap();
                assert_eq!(
                    (points(&table), table.lost),
                    (vec![(21, "/"), (23, "/log")], 1),
                    "{object:#x} {how}"
                );
            },
        );
    }
    // One that no other leads to.
    let [before, after] = [0, 2].map(|number| mount(number) + MOUNT_LIST);
    guest.put_word(PLACE.gpa + before, PLACE.gva + after);
    guest.put_word(PLACE.gpa + after + 8, PLACE.gva + before);
    let table = mounts(&kernel).unwrap();
    assert_eq!((points(&table), table.lost), (vec![(21, "/"), (23, "/log")], 1));
    guest.put_word(PLACE.gpa + NAMESPACE, PLACE.gva + NAMESPACE);
    assert!(matches!(mounts(&kernel), Err(KernelError::Malformed { .. })), "an empty list");
}
