// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes BTF.

/// Types and names.
#[derive(Default)]
pub(crate) struct Builder {
    types: Vec<u8>,
    strings: Vec<u8>,
    count: u32,
}

/// Name, type, and place in bits; of bit fields the size as well.
pub(crate) type Member<'a> = (&'a str, u32, u32, u32);

impl Builder {
    pub(crate) fn string(&mut self, name: &str) -> u32 {
        if self.strings.is_empty() {
            self.strings.push(0);
        }
        if name.is_empty() {
            return 0;
        }
        let at = u32::try_from(self.strings.len()).unwrap();
        self.strings.extend(name.bytes().chain([0]));
        at
    }

    /// A type with what follows it.
    pub(crate) fn add(&mut self, name: &str, info: u32, size_or_type: u32, more: &[u32]) -> u32 {
        let name = self.string(name);
        let words = [name, info, size_or_type].into_iter().chain(more.iter().copied());
        self.types.extend(words.flat_map(u32::to_le_bytes));
        self.count += 1;
        self.count
    }

    pub(crate) fn int(&mut self, name: &str, size: u32) -> u32 {
        self.add(name, 1 << 24, size, &[size * 8])
    }

    pub(crate) fn pointer(&mut self, to: u32) -> u32 {
        self.add("", 2 << 24, to, &[])
    }

    pub(crate) fn array(&mut self, of: u32, len: u32) -> u32 {
        self.add("", 3 << 24, 0, &[of, of, len])
    }

    /// Structures have kind 4, unions 5.
    pub(crate) fn structure(
        &mut self,
        kind: u32,
        name: &str,
        size: u32,
        members: &[Member<'_>],
    ) -> u32 {
        let has_bits = members.iter().any(|(.., bits)| *bits > 0);
        let more: Vec<u32> = members
            .iter()
            .flat_map(|(name, id, place, bits)| [self.string(name), *id, place | bits << 24])
            .collect();
        let count = u32::try_from(members.len()).unwrap();
        self.add(name, kind << 24 | count | u32::from(has_bits) << 31, size, &more)
    }

    /// A structure of the given size, with members at these bytes.
    pub(crate) fn plain(&mut self, name: &str, size: u32, members: &[(&str, u32, u32)]) -> u32 {
        let members: Vec<Member<'_>> =
            members.iter().map(|(name, id, at)| (*name, *id, at * 8, 0)).collect();
        self.structure(4, name, size, &members)
    }

    pub(crate) fn enumeration(&mut self, name: &str, values: &[(&str, i32)]) -> u32 {
        let more: Vec<u32> = values
            .iter()
            .flat_map(|(name, value)| [self.string(name), value.cast_unsigned()])
            .collect();
        self.add(name, 6 << 24 | 1 << 31 | u32::try_from(values.len()).unwrap(), 4, &more)
    }

    pub(crate) fn build(mut self) -> Vec<u8> {
        self.string("");
        let (types, strings) =
            (u32::try_from(self.types.len()).unwrap(), u32::try_from(self.strings.len()).unwrap());
        let mut blob = vec![0x9f, 0xeb, 1, 0];
        blob.extend(
            [24, 0, types, types, strings].iter().flat_map(|word: &u32| word.to_le_bytes()),
        );
        blob.extend(self.types);
        blob.extend(self.strings);
        blob
    }
}

/// The types of the kernel that the guest has.
pub(crate) fn kernel() -> Vec<u8> {
    with_areas(true)
}

/// The same; the memory areas of a process are in a tree, or in a list.
pub(crate) fn with_areas(in_tree: bool) -> Vec<u8> {
    let mut btf = Builder::default();
    let char = btf.int("char", 1);
    let int = btf.int("int", 4);
    let pid = btf.add("pid_t", 8 << 24, int, &[]);
    let constant = btf.add("", 10 << 24, pid, &[]);
    // A pointer to the structure after it.
    let pointer = btf.pointer(6);
    let list =
        btf.structure(4, "list_head", 16, &[("next", pointer, 0, 0), ("prev", pointer, 64, 0)]);
    assert_eq!(list, 6);
    let text = btf.array(char, 16);
    let matrix = btf.array(text, 3);
    let inner = btf.structure(5, "", 4, &[("pid", constant, 0, 0), ("number", int, 0, 0)]);
    let outer = btf.structure(4, "", 8, &[("", inner, 0, 0)]);
    let flags =
        btf.structure(4, "", 4, &[("low", int, 0, 2), ("odd", int, 2, 3), ("high", int, 5, 3)]);
    btf.structure(
        4,
        "task_struct",
        64,
        &[
            ("tasks", list, 0, 0),
            ("none", 0, 16 * 8, 0),
            ("", outer, 24 * 8, 0),
            ("flags", flags, 28 * 8, 0),
            ("comm", text, 32 * 8, 0),
            ("tail", pointer, 48 * 8, 0),
            ("mm", pointer, 56 * 8, 0),
        ],
    );
    btf.structure(4, "wide", 48, &[("matrix", matrix, 0, 0), ("task", 12, 0, 0)]);
    btf.enumeration("pid_type", &[("PIDTYPE_PID", 0), ("PIDTYPE_TGID", 1), ("PIDTYPE_NONE", -1)]);
    memory(&mut btf, in_tree);
    btf.build()
}

/// Structures of a process's memory, and of files.
fn memory(btf: &mut Builder, in_tree: bool) {
    let (int, long) = (btf.int("unsigned int", 4), btf.int("unsigned long", 8));
    let path = btf.plain("path", 16, &[("mnt", long, 0), ("dentry", long, 8)]);
    btf.plain("file", 64, &[("f_path", path, 0), ("f_inode", long, 16)]);
    btf.plain("inode", 32, &[("i_sb", long, 0), ("i_ino", long, 8)]);
    btf.plain("super_block", 32, &[("s_magic", long, 0), ("s_dev", int, 8)]);
    let hash = btf.plain("hlist_bl_node", 16, &[("next", long, 0), ("pprev", long, 8)]);
    let name = btf.plain("qstr", 16, &[("len", int, 4), ("name", long, 8)]);
    let dentry = [
        ("d_hash", hash, 0),
        ("d_parent", long, 16),
        ("d_name", name, 24),
        ("d_inode", long, 40),
        ("d_sb", long, 48),
    ];
    btf.plain("dentry", 64, &dentry);
    let vfsmount = btf.plain("vfsmount", 16, &[("mnt_root", long, 0)]);
    btf.plain(
        "mount",
        64,
        &[("mnt_parent", long, 0), ("mnt_mountpoint", long, 8), ("mnt", vfsmount, 16)],
    );
    let tree = btf.plain("maple_tree", 16, &[("ma_root", long, 8)]);
    let areas = if in_tree { ("mm_mt", tree, 0) } else { ("mmap", long, 0) };
    let mm = [
        ("map_count", int, 16),
        ("start_brk", long, 24),
        ("brk", long, 32),
        ("start_stack", long, 40),
        ("pgd", long, 48),
    ];
    btf.plain("mm_struct", 64, &[&[areas], &mm[..]].concat());
    let area = [
        ("vm_start", long, 0),
        ("vm_end", long, 8),
        ("vm_mm", long, 16),
        ("vm_flags", long, 24),
        ("vm_pgoff", long, 32),
        ("vm_file", long, 40),
        ("vm_ops", long, 48),
        ("vm_private_data", long, 56),
        ("vm_next", long, 64),
    ];
    btf.plain("vm_area_struct", 72, if in_tree { &area[..8] } else { &area });
    btf.plain("vm_special_mapping", 8, &[("name", long, 0)]);
    let meta = btf.plain("maple_metadata", 2, &[("end", int, 0), ("gap", int, 1)]);
    for (name, slots) in [("maple_range_64", 16), ("maple_arange_64", 10)] {
        let (pivots, used) = (btf.array(long, slots - 1), btf.array(long, slots));
        let pad = btf.array(long, slots - 1);
        let at = 8 * slots;
        if slots == 16 {
            let padded = btf.plain("", 128, &[("pad", pad, 0), ("meta", meta, 120)]);
            let union = btf.structure(5, "", 128, &[("slot", used, 0, 0), ("", padded, 0, 0)]);
            btf.plain(name, 256, &[("parent", long, 0), ("pivot", pivots, 8), ("", union, at)]);
        } else {
            btf.plain(
                name,
                248,
                &[
                    ("parent", long, 0),
                    ("pivot", pivots, 8),
                    ("slot", used, at),
                    ("meta", meta, 240),
                ],
            );
        }
    }
    btf.enumeration(
        "maple_type",
        &[("maple_dense", 0), ("maple_leaf_64", 1), ("maple_range_64", 2), ("maple_arange_64", 3)],
    );
}
