// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a process has mapped, as the kernel lists it in `/proc/PID/maps`.

use crate::file_id::FileId;

/// Memory of a process that it may write.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mapping {
    /// Its first address, in the process.
    pub hva: u64,
    /// Length, bytes.
    pub len: u64,
    /// Whether what is written there goes to others as well.
    pub is_shared: bool,
    /// The file, and the place in it of the first byte; `None` for anonymous memory.
    pub file: Option<(FileId, u64)>,
    /// What the kernel calls it.
    pub path: String,
}

impl Mapping {
    /// The shared file behind it, and the place in it of the first byte.
    pub fn shared_file(&self) -> Option<(FileId, u64)> {
        self.file.filter(|_| self.is_shared)
    }

    /// Whether addresses `hva` to `hva + len` are part of it.
    pub fn covers(&self, hva: u64, len: u64) -> bool {
        hva.checked_sub(self.hva)
            .and_then(|start| start.checked_add(len))
            .is_some_and(|end| end <= self.len)
    }

    /// Whether `next` continues the same file where this one ends: the kernel lists a mapping in
    /// parts where only its NUMA policy or the like differs.
    fn is_continued_by(&self, next: &Self) -> bool {
        let (Some((file, offset)), Some((next_file, next_offset))) = (self.file, next.file) else {
            return false;
        };
        self.hva.checked_add(self.len) == Some(next.hva)
            && offset.checked_add(self.len) == Some(next_offset)
            && (file, self.is_shared) == (next_file, next.is_shared)
    }
}

/// The mapping that addresses `hva` to `hva + len` are part of.
pub fn covering(mappings: &[Mapping], hva: u64, len: u64) -> Option<&Mapping> {
    mappings.iter().find(|mapping| mapping.covers(hva, len))
}

/// The mappings that may be written and hold no code, by ascending address. What is no line of the
/// kernel's is left out.
pub fn parse(text: &str) -> Vec<Mapping> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for mapping in text.lines().filter_map(line) {
        match mappings.last_mut().filter(|last| last.is_continued_by(&mapping)) {
            Some(last) => last.len = last.len.saturating_add(mapping.len),
            None => mappings.push(mapping),
        }
    }
    mappings
}

fn line(line: &str) -> Option<Mapping> {
    let hex = |text: &str| u64::from_str_radix(text, 16).ok();
    let mut words = line.splitn(6, ' ');
    let (start, end) = words.next()?.split_once('-')?;
    let mode = words.next().filter(|mode| mode.starts_with("rw-"))?;
    let offset = hex(words.next()?)?;
    let (major, minor) = words.next()?.split_once(':')?;
    let device = rustix::fs::makedev(
        u32::from_str_radix(major, 16).ok()?,
        u32::from_str_radix(minor, 16).ok()?,
    );
    let inode: u64 = words.next()?.parse().ok()?;
    let hva = hex(start)?;
    Some(Mapping {
        hva,
        len: hex(end)?.checked_sub(hva)?,
        is_shared: mode.ends_with('s'),
        file: (inode != 0).then_some((FileId { device, inode }, offset)),
        path: words.next().unwrap_or_default().trim_start().to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LINE: &str = "7f8a7bfff000-7f8a9bfff000 rw-s 00000000 00:01 17753                      /memfd:memory-backend-memfd (deleted)";

    #[test]
    fn writable_mappings_are_taken() {
        let [mapping] = parse(LINE).try_into().unwrap();
        assert_eq!(
            (mapping.hva, mapping.len, mapping.is_shared),
            (0x7f8a_7bff_f000, 0x2000_0000, true)
        );
        assert_eq!(mapping.path, "/memfd:memory-backend-memfd (deleted)");
        let (file, offset) = mapping.shared_file().unwrap();
        assert_eq!((file.inode, offset), (17753, 0));
        assert!(
            mapping.covers(0x7f8a_7bff_f000, 0x2000_0000) && mapping.covers(0x7f8a_8000_0000, 1)
        );
        assert!(
            !mapping.covers(0x7f8a_7bff_efff, 1) && !mapping.covers(0x7f8a_7bff_f001, 0x2000_0000)
        );
        assert!(!mapping.covers(0x7f8a_8000_0000, u64::MAX));
        assert_eq!(parse(&LINE.replace("rw-s", "rw-p"))[0].shared_file(), None);
        assert_eq!(parse(&LINE.replace("rw-s", "r--s")), []);
        assert_eq!(parse("7f427be00000-7f427fe00000 rw-p 00000000 00:00 0 ")[0].file, None);
    }

    #[test]
    fn parts_of_one_mapping_are_joined_and_neighbours_are_not() {
        let text = "\
1000-3000 rw-s 00000000 00:01 7 /memfd:a
3000-4000 rw-s 00002000 00:01 7 /memfd:a
4000-5000 rw-s 00000000 00:01 7 /memfd:a
5000-6000 rw-s 00001000 00:01 8 /memfd:b
6000-7000 rw-p 00002000 00:01 8 /memfd:b
7000-8000 rw-p 00000000 00:00 0
8000-9000 rw-p 00000000 00:00 0 ";
        let places: Vec<(u64, u64)> =
            parse(text).iter().map(|mapping| (mapping.hva, mapping.len)).collect();
        let page = 0x1000;
        assert_eq!(
            places,
            [
                (0x1000, 3 * page),
                (0x4000, page),
                (0x5000, page),
                (0x6000, page),
                (0x7000, page),
                (0x8000, page)
            ]
        );
    }

    proptest! {
        #[test]
        fn any_text_is_read_without_harm(text in "([0-9a-f: rwps/()-]{0,80}\n){0,4}|.{0,80}", hva: u64, len: u64) {
            for mapping in parse(&text) {
                let _ = mapping.covers(hva, len);
            }
        }
    }
}
