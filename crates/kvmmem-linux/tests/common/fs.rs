// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A kernel with a process that has open files and sees mounts.

use super::btf::Builder;
use super::objects::structure;
use super::{Guest, PAGE_TABLES, Place};
use kvmmem_linux::tasks::Task;

/// Places in the image. Each has a page of its own.
const TASK: u64 = 0x20_0000;
const SIGNAL: u64 = 0x20_1000;
const FILES: u64 = 0x20_2000;
pub(crate) const FDTABLE: u64 = 0x20_3000;
pub(crate) const FDS: u64 = 0x20_4000;
const OPEN_FDS: u64 = 0x20_5000;
const FS: u64 = 0x20_6000;
const PROXY: u64 = 0x20_7000;
pub(crate) const NAMESPACE: u64 = 0x20_8000;
const TYPE: u64 = 0x20_9000;
const SUPER: u64 = 0x20_a000;
const NAMES: u64 = 0x20_b000;
const MM: u64 = 0x20_c000;

/// Of the object with a number.
pub(crate) fn file(number: u64) -> u64 {
    0x21_0000 + 0x1000 * number
}
pub(crate) fn dentry(number: u64) -> u64 {
    0x22_0000 + 0x1000 * number
}
pub(crate) fn mount(number: u64) -> u64 {
    0x23_0000 + 0x1000 * number
}

/// Where a mount has its node, and the `struct vfsmount` in it.
pub(crate) const MOUNT_LIST: u64 = 48;
pub(crate) const VFSMOUNT: u64 = 16;

/// Name and parent of each directory entry: the roots of three mounts, where two of these lie, and
/// a file in each.
const DENTRIES: [(&str, u64); 8] = [
    ("/", 0),
    ("/", 1),
    ("/", 2),
    ("data", 0),
    ("log", 0),
    ("passwd", 0),
    ("table", 1),
    ("journal", 2),
];

/// The process.
pub(crate) fn task(place: &Place) -> Task {
    Task { gva: place.gva + TASK, ..super::areas::task(place) }
}

/// A guest with such a kernel: descriptors 0, 2 and 3 are open.
pub(crate) fn guest(place: &Place) -> Guest {
    let guest = Guest::default();
    guest.boot_with(place, &types(), Vec::new());
    let word = |at: u64, word: u64| guest.put_word(place.gpa + at, word);
    let half = |at: u64, half: u32| guest.put(place.gpa + at, &half.to_le_bytes());
    let pointer = |at: u64, to: u64| word(at, place.gva + to);
    [(0, FILES), (8, FS), (16, PROXY), (24, SIGNAL)]
        .into_iter()
        .for_each(|(at, to)| pointer(TASK + at, to));
    half(SIGNAL, 1);
    pointer(FILES, FDTABLE);
    half(FDTABLE, 64);
    pointer(FDTABLE + 8, FDS);
    pointer(FDTABLE + 16, OPEN_FDS);
    word(OPEN_FDS, 0b1101);
    for (number, (name, parent)) in (0..).zip(DENTRIES) {
        guest.put(place.gpa + NAMES + 16 * number, name.as_bytes());
        let dentry = |at: u64| self::dentry(number) + at;
        pointer(dentry(0), self::dentry(parent));
        half(dentry(8), u32::try_from(name.len()).unwrap());
        pointer(dentry(16), NAMES + 16 * number);
        pointer(dentry(32), dentry(0));
        pointer(dentry(40), SUPER);
    }
    for (number, fd) in (0..).zip([0, 2, 3]) {
        pointer(FDS + 8 * fd, file(number));
        pointer(file(number), mount(number) + VFSMOUNT);
        pointer(file(number) + 8, dentry(5 + number));
        half(file(number) + 16, 2);
        word(file(number) + 24, 100 + number);
    }
    // Its page tables are the kernel's, and the names its environment.
    pointer(TASK + 32, MM);
    [(0, PAGE_TABLES), (8, file(1)), (16, NAMES), (24, NAMES + 64)]
        .into_iter()
        .for_each(|(at, to)| pointer(MM + at, to));
    guest.put(place.gpa + TYPE + 16, b"ext4");
    pointer(TYPE, TYPE + 16);
    word(SUPER, 0xef53);
    pointer(SUPER + 24, TYPE);
    pointer(FS, mount(0) + VFSMOUNT);
    pointer(FS + 8, dentry(0));
    pointer(PROXY, NAMESPACE);
    half(NAMESPACE + 16, 3);
    let ring = [NAMESPACE, mount(0) + MOUNT_LIST, mount(1) + MOUNT_LIST, mount(2) + MOUNT_LIST];
    for (n, node) in ring.iter().enumerate() {
        pointer(*node, ring[(n + 1) % 4]);
        pointer(node + 8, ring[(n + 3) % 4]);
    }
    for number in 0..3 {
        let mount = |at: u64| self::mount(number) + at;
        pointer(mount(0), self::mount(0));
        pointer(mount(8), dentry(if number == 0 { 0 } else { 2 + number }));
        pointer(mount(16), dentry(number));
        pointer(mount(24), SUPER);
        half(mount(64), 21 + u32::try_from(number).unwrap());
    }
    guest
}

fn types() -> Vec<u8> {
    let mut btf = Builder::default();
    let long = btf.int("long", 8);
    let list = structure(&mut btf, "list_head", 16, &[("next", long, 0), ("prev", long, 8)]);
    let path = structure(&mut btf, "path", 16, &[("mnt", long, 0), ("dentry", long, 8)]);
    let name = structure(&mut btf, "qstr", 16, &[("len", long, 0), ("name", long, 8)]);
    let hash = structure(&mut btf, "hlist_bl_node", 16, &[("next", long, 0), ("pprev", long, 8)]);
    let vfsmount = [("mnt_root", long, 0), ("mnt_sb", long, 8), ("mnt_flags", long, 16)];
    let vfsmount = structure(&mut btf, "vfsmount", 24, &vfsmount);
    let task = [
        ("files", long, 0),
        ("fs", long, 8),
        ("nsproxy", long, 16),
        ("signal", long, 24),
        ("mm", long, 32),
        ("cred", long, 40),
    ];
    structure(&mut btf, "task_struct", 48, &task);
    let mm =
        [("pgd", long, 0), ("exe_file", long, 8), ("env_start", long, 16), ("env_end", long, 24)];
    structure(&mut btf, "mm_struct", 32, &mm);
    structure(&mut btf, "signal_struct", 8, &[("nr_threads", long, 0)]);
    structure(&mut btf, "files_struct", 8, &[("fdt", long, 0)]);
    structure(
        &mut btf,
        "fdtable",
        24,
        &[("max_fds", long, 0), ("fd", long, 8), ("open_fds", long, 16)],
    );
    structure(
        &mut btf,
        "file",
        32,
        &[("f_path", path, 0), ("f_flags", long, 16), ("f_pos", long, 24)],
    );
    let dentry = [
        ("d_parent", long, 0),
        ("d_name", name, 8),
        ("d_hash", hash, 24),
        ("d_sb", long, 40),
        ("d_inode", long, 48),
    ];
    structure(&mut btf, "dentry", 56, &dentry);
    structure(
        &mut btf,
        "super_block",
        32,
        &[("s_magic", long, 0), ("s_dev", long, 8), ("s_flags", long, 16), ("s_type", long, 24)],
    );
    structure(&mut btf, "inode", 8, &[("i_ino", long, 0)]);
    let mount = [
        ("mnt_parent", long, 0),
        ("mnt_mountpoint", long, 8),
        ("mnt", vfsmount, VFSMOUNT),
        ("mnt_list", list, MOUNT_LIST),
        ("mnt_id", long, 64),
        ("mnt_devname", long, 72),
    ];
    structure(&mut btf, "mount", 80, &mount);
    structure(&mut btf, "file_system_type", 8, &[("name", long, 0)]);
    structure(&mut btf, "nsproxy", 8, &[("mnt_ns", long, 0)]);
    structure(&mut btf, "mnt_namespace", 24, &[("list", list, 0), ("mounts", long, 16)]);
    structure(&mut btf, "fs_struct", 16, &[("root", path, 0)]);
    btf.build()
}
