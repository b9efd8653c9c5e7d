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
    pub(crate) fn structure(&mut self, kind: u32, name: &str, size: u32, members: &[Member<'_>]) -> u32 {
        let has_bits = members.iter().any(|(.., bits)| *bits > 0);
        let more: Vec<u32> = members
            .iter()
            .flat_map(|(name, id, place, bits)| [self.string(name), *id, place | bits << 24])
            .collect();
        let count = u32::try_from(members.len()).unwrap();
        self.add(name, kind << 24 | count | u32::from(has_bits) << 31, size, &more)
    }

    pub(crate) fn enumeration(&mut self, name: &str, values: &[(&str, i32)]) -> u32 {
        let more: Vec<u32> =
            values.iter().flat_map(|(name, value)| [self.string(name), value.cast_unsigned()]).collect();
        self.add(name, 6 << 24 | 1 << 31 | u32::try_from(values.len()).unwrap(), 4, &more)
    }

    pub(crate) fn build(mut self) -> Vec<u8> {
        self.string("");
        let (types, strings) =
            (u32::try_from(self.types.len()).unwrap(), u32::try_from(self.strings.len()).unwrap());
        let mut blob = vec![0x9f, 0xeb, 1, 0];
        blob.extend([24, 0, types, types, strings].iter().flat_map(|word: &u32| word.to_le_bytes()));
        blob.extend(self.types);
        blob.extend(self.strings);
        blob
    }
}

/// The types of the kernel that the guest has.
pub(crate) fn kernel() -> Vec<u8> {
    let mut btf = Builder::default();
    let char = btf.int("char", 1);
    let int = btf.int("int", 4);
    let pid = btf.add("pid_t", 8 << 24, int, &[]);
    let constant = btf.add("", 10 << 24, pid, &[]);
    // A pointer to the structure after it.
    let pointer = btf.pointer(6);
    let list = btf.structure(4, "list_head", 16, &[("next", pointer, 0, 0), ("prev", pointer, 64, 0)]);
    assert_eq!(list, 6);
    let text = btf.array(char, 16);
    let matrix = btf.array(text, 3);
    let inner = btf.structure(5, "", 4, &[("pid", constant, 0, 0), ("number", int, 0, 0)]);
    let outer = btf.structure(4, "", 8, &[("", inner, 0, 0)]);
    let flags = btf.structure(4, "", 4, &[("low", int, 0, 2), ("odd", int, 2, 3), ("high", int, 5, 3)]);
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
        ],
    );
    btf.structure(4, "wide", 48, &[("matrix", matrix, 0, 0), ("task", 12, 0, 0)]);
    btf.enumeration("pid_type", &[("PIDTYPE_PID", 0), ("PIDTYPE_TGID", 1), ("PIDTYPE_NONE", -1)]);
    btf.build()
}
