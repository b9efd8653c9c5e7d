// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Processes that change while they are read.

mod common;

use std::sync::atomic::AtomicU64;

use common::processes::{COMM, Change, ChangingMemory, end, guest, task};
use common::{Guest, NAMES, Place};
use kvmmem_linux::tasks::{Task, Tasks, Which};
use kvmmem_linux::{Find, Kernel};

/// The processes of a guest that runs `change` with the number of the read, each time the second
/// process's name is read.
fn read(guest: &Guest, change: Change<'_>) -> Vec<Task> {
    let at = Place::FIRST.gpa + task(2) + COMM;
    let memory = ChangingMemory { guest, at, change, reads: AtomicU64::new(0) };
    let kernel = Kernel::find(&memory, Find::default()).unwrap();
    Tasks::new(&kernel, Which::Processes).unwrap().collect::<Result<_, _>>().unwrap()
}

fn rows(tasks: &[Task]) -> Vec<(u32, &str, bool)> {
    tasks.iter().map(|task| (task.pid, task.comm.as_str(), task.is_torn)).collect()
}

fn rename(guest: &Guest, name: &[u8; 16]) {
    guest.put(Place::FIRST.gpa + task(2) + COMM, name);
}

#[test]
fn what_keeps_still_is_not_torn() {
    let tasks = read(&guest(), &|_, _| {});
    assert_eq!(
        rows(&tasks),
        NAMES[1..].iter().map(|(pid, name)| (*pid, *name, false)).collect::<Vec<_>>()
    );
    let Task { ppid, uid, euid, gid, state, .. } = tasks[0];
    assert_eq!((ppid, uid, euid, gid, state), (Some(0), Some(1000), Some(1001), Some(1002), 'S'));
}

#[test]
fn what_changes_whenever_it_is_read_is_torn_and_never_made_up() {
    let names = [b"aaaaaaaaaaaaaaa\0", b"bbbbbbbbbbbbbbb\0"];
    let tasks = read(&guest(), &|guest, reads| rename(guest, names[usize::from(reads % 2 == 0)]));
    let [(1, "init", false), (2, name, true), (77, "exactly15chars!", false)] = rows(&tasks)[..]
    else {
        panic!("{tasks:?}")
    };
    assert!(["aaaaaaaaaaaaaaa", "bbbbbbbbbbbbbbb"].contains(&name), "{name}");
}

#[test]
fn what_changes_once_is_read_again() {
    let tasks = read(&guest(), &|guest, reads| {
        if reads == 0 {
            rename(guest, b"renamed\0\0\0\0\0\0\0\0\0");
        }
    });
    assert_eq!(
        rows(&tasks),
        [(1, "init", false), (2, "renamed", false), (77, "exactly15chars!", false)]
    );
}

#[test]
fn a_process_that_ends_meanwhile_is_left_out() {
    for after in 0..2 {
        let tasks = read(&guest(), &|guest, reads| {
            if reads == after {
                end(guest, 2);
            }
        });
        assert_eq!(
            rows(&tasks),
            [(1, "init", false), (77, "exactly15chars!", false)],
            "after {after} reads"
        );
    }
    // The last one.
    let guest = guest();
    let at = Place::FIRST.gpa + task(3) + COMM;
    let change: Change<'_> = &|guest, _| end(guest, 3);
    let memory = ChangingMemory { guest: &guest, at, change, reads: AtomicU64::new(0) };
    let kernel = Kernel::find(&memory, Find::default()).unwrap();
    let tasks: Vec<Task> =
        Tasks::new(&kernel, Which::Processes).unwrap().collect::<Result<_, _>>().unwrap();
    assert_eq!(rows(&tasks), [(1, "init", false), (2, "kthreadd", false)]);
}
