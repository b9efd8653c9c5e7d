// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A guest with a process that has memory of its own, after the RAM that the kernel is in.

use std::fs::File;
use std::os::unix::fs::FileExt;

use kvmmem_client::vmm::Region;

use crate::builder::btf::Builder;
use crate::builder::{BTF, Guest, Place, RAM, processes};
use crate::common::Host;

/// The process, and the number of its task.
pub(crate) const PID: &str = "77";
const TASK: usize = 3;

/// Where its memory is.
pub(crate) const GVA: u64 = 0x4000_0000;

/// Another process's task, whose number is here in RAM.
pub(crate) fn number_of_another() -> u64 {
    Place::FIRST.gpa + processes::task(1) + processes::PID
}

/// What the process has in the kernel's image.
const MM: u64 = 0x22_0000;
const SIGNALS: u64 = 0x22_1000;
const AREAS: u64 = 0x22_2000;
const TABLES: u64 = 0x30_0000;
const AREA: u64 = 72;

/// The pointer from the process's first area to its second.
pub(crate) fn second_area() -> u64 {
    Place::FIRST.gpa + AREAS + 64
}

/// The guest's memory, with `len` bytes of the process's, in which each page has a text of its own.
pub(crate) fn memory(guest: &Guest, len: u64) -> Vec<u8> {
    let mut memory = guest.bytes(0, RAM);
    for page in 0..len / 0x1000 {
        let text = format!("the needle in page {page} of the memory of process {PID}");
        let mut bytes = text.into_bytes();
        bytes.resize(0x1000, 0xff);
        memory.extend(bytes);
    }
    memory
}

/// A target with this memory.
pub(crate) fn target(memory: &[u8]) -> Host {
    let host = Host::start(&[Region { gpa: 0, len: memory.len() as u64, offset: 0, file: 0 }]);
    ram(&host).write_all_at(memory, 0).unwrap();
    host
}

/// Its RAM.
pub(crate) fn ram(host: &Host) -> File {
    File::from(host.ram.fd().try_clone_to_owned().unwrap())
}

/// Starts another kernel in a target's memory, at another place.
pub(crate) fn restart(host: &Host) {
    ram(host).write_all_at(&Guest::with(&[Place::SECOND]).bytes(0, RAM), 0).unwrap();
}

/// The guest, whose process has so many bytes in memory, in two areas.
pub(crate) fn guest(len: u64) -> Guest {
    let guest = processes::guest();
    let Place { gpa, gva, .. } = Place::FIRST;
    guest.put(gpa + BTF, &types());
    // Each process has one thread.
    for (n, signal) in (0..4).zip((SIGNALS..).step_by(0x100)) {
        let task = processes::task(n);
        guest.put_word(gpa + task + 32, gva + signal);
        for (node, next) in [(signal, task + 16), (task + 16, signal)] {
            guest.put_word(gpa + node, gva + next);
            guest.put_word(gpa + node + 8, gva + next);
        }
    }
    let task = gpa + processes::task(TASK);
    // No flag: it is not the kernel's own.
    guest.put(task + 72, &[0; 4]);
    guest.put_word(task + 104, gva + MM);
    guest.put_word(task + 112, gva + 0x23_0000);
    for (at, word) in [
        (0, gva + AREAS),
        (16, 2),
        (48, gva + TABLES),
        // An empty command line.
        (56, GVA),
        (64, GVA),
        (72, GVA),
    ] {
        guest.put_word(gpa + MM + at, word);
    }
    let middle = GVA + len / 2;
    for (at, words) in [
        (AREAS, [GVA, middle, gva + MM, 3, 0, 0, 0, 0, gva + AREAS + AREA]),
        (AREAS + AREA, [middle, GVA + len, gva + MM, 3, 0, 0, 0, 0, 0]),
    ] {
        guest.put(gpa + at, &words.map(u64::to_le_bytes).concat());
    }
    let table = |level: u64| gpa + TABLES + 0x1000 * level;
    guest.put_word(table(0), table(1) | 7);
    guest.put_word(table(1) + 8 * (GVA >> 30), table(2) | 7);
    for page in 0..len / 0x1000 {
        let last = table(3 + page / 512);
        guest.put_word(table(2) + 8 * (page / 512), last | 7);
        guest.put_word(last + 8 * (page % 512), (RAM as u64 + 0x1000 * page) | 7);
    }
    guest
}

/// Its kernel's types, with the members that verbs about a process need.
fn types() -> Vec<u8> {
    let mut btf = Builder::default();
    let (char, int, long) = (btf.int("char", 1), btf.int("int", 4), btf.int("long", 8));
    let text = btf.array(char, 16);
    let list = btf.plain("list_head", 16, &[("next", long, 0), ("prev", long, 8)]);
    let thread = btf.plain("thread_struct", 16, &[("fsbase", long, 0), ("gsbase", long, 8)]);
    let task = [
        ("tasks", list, 0),
        ("thread_node", list, 16),
        ("signal", long, 32),
        ("pid", int, 40),
        ("tgid", int, 44),
        ("real_parent", long, 48),
        ("comm", text, 56),
        ("flags", int, 72),
        ("__state", int, 76),
        ("exit_state", int, 80),
        ("usage", int, 84),
        ("cred", long, 88),
        ("start_boottime", long, 96),
        ("mm", long, 104),
        ("stack", long, 112),
        ("thread", thread, 120),
    ];
    btf.plain("task_struct", 0x100, &task);
    btf.plain("signal_struct", 16, &[("thread_head", list, 0)]);
    btf.plain("cred", 16, &[("uid", int, 0), ("euid", int, 4), ("gid", int, 8)]);
    let names = ["mmap", "", "", "start_brk", "brk", "start_stack", "pgd", "arg_start", "arg_end"];
    let names = names.into_iter().chain(["env_end", "saved_auxv"]);
    let mut mm: Vec<_> = names.zip((0..).step_by(8)).map(|(name, at)| (name, long, at)).collect();
    mm.retain(|(name, ..)| !name.is_empty());
    mm.push(("map_count", int, 16));
    btf.plain("mm_struct", 0x400, &mm);
    let words = |names: &[&'static str]| -> Vec<(&'static str, u32, u32)> {
        names.iter().zip((0..).step_by(8)).map(|(name, at)| (*name, long, at)).collect()
    };
    let area = [
        "vm_start",
        "vm_end",
        "vm_mm",
        "vm_flags",
        "vm_pgoff",
        "vm_file",
        "vm_ops",
        "vm_private_data",
        "vm_next",
    ];
    btf.plain("vm_area_struct", 72, &words(&area));
    btf.plain("vm_special_mapping", 8, &words(&["name"]));
    let path = btf.plain("path", 16, &words(&["mnt", "dentry"]));
    btf.plain("file", 64, &[("f_path", path, 0), ("f_inode", long, 16)]);
    btf.plain("inode", 16, &words(&["i_sb", "i_ino"]));
    btf.plain("super_block", 16, &words(&["s_magic", "s_dev"]));
    let hash = btf.plain("hlist_bl_node", 16, &words(&["next", "pprev"]));
    let name = btf.plain("qstr", 16, &words(&["len", "name"]));
    let dentry = [
        ("d_hash", hash, 0),
        ("d_parent", long, 16),
        ("d_name", name, 24),
        ("d_inode", long, 40),
        ("d_sb", long, 48),
    ];
    btf.plain("dentry", 64, &dentry);
    let vfsmount = btf.plain("vfsmount", 8, &words(&["mnt_root"]));
    let mount = [("mnt_parent", long, 0), ("mnt_mountpoint", long, 8), ("mnt", vfsmount, 16)];
    btf.plain("mount", 32, &mount);
    btf.build()
}
