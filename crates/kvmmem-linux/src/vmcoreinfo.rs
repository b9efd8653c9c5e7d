// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The VMCOREINFO note that a Linux guest keeps in its RAM: symbols, offsets and numbers that a
//! tool needs to read the kernel's memory (Documentation/admin-guide/kdump/vmcoreinfo.rst).
//!
//! [`crate::search`] finds it. All its values are untrusted. The guest can forge a note, and a
//! reset that keeps RAM leaves the note of the previous kernel. [`Note::check`] checks a note
//! against the page tables and the kernel's name in memory; a stale note may fit as well, so that a
//! caller with several notes that fit must not take any of them.

use std::error::Error;

use kvmmem_memory::paging::{AddressSpace, Levels, WalkError};

/// `Elf64_Nhdr` with n_namesz 11 and n_type 0, and the name, padded to 12; n_descsz is at 4.
const NAME_SIZE: u32 = 11;
const NAME: &[u8; 12] = b"VMCOREINFO\0\0";

/// Bytes before the text.
pub(crate) const HEADER: usize = 24;

/// The longest text: the kernel has a page for it.
const MAX_TEXT: u32 = 4096;

/// Where the kernel's image is mapped before it is moved (`__START_KERNEL_map`).
pub const KERNEL_MAP: u64 = 0xffff_ffff_8000_0000;

/// Where the release is in `struct new_utsname`, and how long its field is.
const RELEASE_AT: u64 = 2 * UTS_LEN as u64;
const UTS_LEN: usize = 65;

/// Offset of the names in `struct uts_namespace`, for kernels whose note lacks it: after a
/// reference counter.
const UTS_NAME_AT: u64 = 4;

/// A note as it lies in memory, or the same lines about a kernel that has none.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Address of its header; `None` for a note that [`crate::kernel`] made for a kernel without
    /// one.
    pub gpa: Option<u64>,
    pub(crate) text: String,
}

/// Why a note does not describe the kernel in memory.
#[derive(Debug, thiserror::Error)]
pub enum NoteError<E: Error + 'static> {
    /// It lacks a line, or the line holds no number.
    #[error("the note has no {0} that makes sense")]
    Missing(&'static str),
    /// The addresses that it gives lead nowhere.
    #[error("the note's page tables do not lead to the kernel's name")]
    Walk(#[source] WalkError<E>),
    /// Another name is there.
    #[error("the note is of kernel {0:?}, and another name is where that should be")]
    Release(String),
}

/// Whether a note begins with these bytes.
pub(crate) fn is_header(bytes: &[u8]) -> bool {
    text_len(bytes).is_some()
}

/// Length of the text of the note that begins with `page`, if one does.
fn text_len(page: &[u8]) -> Option<usize> {
    let word = |at: usize| Some(u32::from_le_bytes(*page.get(at..)?.first_chunk::<4>()?));
    let fits = word(0)? == NAME_SIZE && word(8)? == 0 && page.get(12..HEADER)? == NAME;
    let len = word(4)?;
    (fits && (1..=MAX_TEXT).contains(&len)).then(|| usize::try_from(len).ok())?
}

impl Note {
    /// Reads the note at `gpa`; `None` where there is no note of text.
    pub fn read<E>(
        gpa: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Option<Self> {
        let mut header = [0; HEADER];
        read(gpa, &mut header).ok()?;
        let mut text = vec![0; text_len(&header)?];
        read(gpa.checked_add(HEADER as u64)?, &mut text).ok()?;
        let text = String::from_utf8(text).ok()?;
        // What is printed must not drive a terminal.
        let is_text = text.chars().all(|c| c == '\n' || c == '\t' || !c.is_control());
        is_text.then_some(Self { gpa: Some(gpa), text })
    }

    /// A note with this text, for example from a file.
    pub fn of_text(gpa: u64, text: String) -> Self {
        Self { gpa: Some(gpa), text }
    }

    /// The lines, each `KEY=VALUE`.
    pub fn text(&self) -> &str {
        &self.text
    }

    /// The value of the first line with this key.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    }

    /// The kernel's release, as `uname -r` prints it.
    pub fn release(&self) -> Option<&str> {
        self.value("OSRELEASE")
    }

    /// The kernel's own address space.
    pub fn address_space(&self) -> Option<AddressSpace> {
        let swapper = self.symbol("swapper_pg_dir")?;
        let phys_base: i64 = self.value("NUMBER(phys_base)")?.parse().ok()?;
        let cr3 = swapper.wrapping_sub(KERNEL_MAP).wrapping_add_signed(phys_base);
        // A kernel that cannot have five levels has no such line.
        let has_five = self.value("NUMBER(pgtable_l5_enabled)").is_some_and(|value| value != "0");
        Some(AddressSpace { cr3, levels: if has_five { Levels::Five } else { Levels::Four } })
    }

    /// Whether the note fits what is in memory: its page tables must lead to the kernel's name, and
    /// that must be the note's. `read` fills a buffer from guest-physical memory.
    ///
    /// # Errors
    /// [`NoteError`]: what does not fit.
    pub fn check<E: Error>(
        &self,
        read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<(), NoteError<E>> {
        let release = self.release().filter(|release| (1..UTS_LEN).contains(&release.len()));
        let release = release.ok_or(NoteError::Missing("OSRELEASE"))?;
        let space = self.address_space();
        let space =
            space.ok_or(NoteError::Missing("SYMBOL(swapper_pg_dir) and NUMBER(phys_base)"))?;
        let namespace =
            self.symbol("init_uts_ns").ok_or(NoteError::Missing("SYMBOL(init_uts_ns)"))?;
        let offset = match self.value("OFFSET(uts_namespace.name)") {
            Some(value) => {
                value.parse().map_err(|_| NoteError::Missing("OFFSET(uts_namespace.name)"))?
            }
            None => UTS_NAME_AT,
        };
        let gva = namespace.wrapping_add(offset).wrapping_add(RELEASE_AT);
        let mut found = vec![0; release.len() + 1];
        space.read(gva, &mut found, read).map_err(NoteError::Walk)?;
        match found.split_last() {
            Some((0, name)) if name == release.as_bytes() => Ok(()),
            _ => Err(NoteError::Release(release.to_owned())),
        }
    }

    /// The address of a symbol.
    pub fn symbol(&self, name: &str) -> Option<u64> {
        self.symbols().find(|(other, _)| *other == name).map(|(_, address)| address)
    }

    /// All symbols and their addresses. Of a few, which are arrays, the note has the value instead.
    pub fn symbols(&self) -> impl Iterator<Item = (&str, u64)> {
        self.text.lines().filter_map(|line| {
            let (name, value) = line.strip_prefix("SYMBOL(")?.split_once(")=")?;
            // The kernel writes them without 0x.
            Some((name, u64::from_str_radix(value, 16).ok()?))
        })
    }

    /// The note's value for a structure: `SIZE(name)`, `OFFSET(name.member)`, `LENGTH(name)`; or a
    /// `NUMBER(name)`.
    pub fn number(&self, key: &str) -> Option<i64> {
        let value = self.value(key)?;
        match value.strip_prefix("0x") {
            Some(hex) => u64::from_str_radix(hex, 16).ok().map(u64::cast_signed),
            None => value.parse().ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{self, ErrorKind};

    use proptest::prelude::*;

    use super::*;

    const RELEASE: &str = "6.12.1-test";

    /// Memory in which a kernel moved by 2 MiB has its tables at 0x301000, and its name, of a page
    /// of 2 MiB, at 0x205104.
    fn memory(five: bool) -> Vec<u8> {
        let mut memory = vec![0; 8 << 20];
        let mut put =
            |at: usize, word: u64| memory[at..at + 8].copy_from_slice(&word.to_le_bytes());
        let mut table = 0x30_1000;
        if five {
            put(table + 511 * 8, 0x30_2000 | 1);
            table = 0x30_2000;
        }
        put(table + 511 * 8, 0x30_3000 | 1);
        put(0x30_3000 + 510 * 8, 0x30_4000 | 1);
        // The image's first 2 MiB at ffffffff80000000 are at 0x200000.
        put(0x30_4000, 0x20_0000 | 1 << 7 | 1);
        let at = 0x20_5000 + 4 + 130;
        memory[at..at + RELEASE.len()].copy_from_slice(RELEASE.as_bytes());
        memory
    }

    fn text(five: bool) -> String {
        format!(
            "OSRELEASE={RELEASE}\nPAGESIZE=4096\nSYMBOL(init_uts_ns)=ffffffff80005000\nOFFSET(uts_namespace.name)=4\n\
             SYMBOL(swapper_pg_dir)=ffffffff80101000\nNUMBER(phys_base)=2097152\nNUMBER(pgtable_l5_enabled)={}\n",
            u8::from(five)
        )
    }

    fn note(text: &str) -> Vec<u8> {
        let len = u32::try_from(text.len()).unwrap();
        [&[11, len, 0].map(u32::to_le_bytes).concat(), &NAME[..], text.as_bytes()].concat()
    }

    fn reader(memory: &[u8]) -> impl Fn(u64, &mut [u8]) -> io::Result<()> {
        |gpa, buf| {
            let start = usize::try_from(gpa).unwrap_or(usize::MAX);
            let place = memory.get(start..).and_then(|rest| rest.get(..buf.len()));
            buf.copy_from_slice(place.ok_or(ErrorKind::UnexpectedEof)?);
            Ok(())
        }
    }

    #[test]
    fn a_note_is_read_and_fits() {
        for five in [false, true] {
            let mut memory = memory(five);
            let bytes = note(&text(five));
            memory[0x40_0000..0x40_0000 + bytes.len()].copy_from_slice(&bytes);
            assert!(is_header(&memory[0x40_0000..]));
            let note = Note::read(0x40_0000, reader(&memory)).unwrap();
            assert_eq!((note.release(), note.text()), (Some(RELEASE), text(five).as_str()));
            note.check(reader(&memory)).unwrap();
        }
    }

    #[test]
    fn what_does_not_fit_is_refused() {
        let good = text(false);
        let check = |text: String| Note::of_text(0, text).check(reader(&memory(false)));
        check(good.clone()).unwrap();
        // A kernel whose note lacks the offset.
        check(good.replace("OFFSET(uts_namespace.name)=4\n", "")).unwrap();
        assert!(matches!(check(good.replace("-test", "-tost")), Err(NoteError::Release(_))));
        assert!(matches!(check(good.replace("6.12.1-test", "6.12.1")), Err(NoteError::Release(_))));
        assert!(matches!(check(good.replace("enabled)=0", "enabled)=1")), Err(NoteError::Walk(_))));
        assert!(matches!(check(good.replace("=2097152", "=-2097152")), Err(NoteError::Walk(_))));
        for key in
            ["OSRELEASE", "SYMBOL(init_uts_ns)", "SYMBOL(swapper_pg_dir)", "NUMBER(phys_base)"]
        {
            assert!(matches!(check(good.replace(key, "X")), Err(NoteError::Missing(_))), "{key}");
        }
        assert!(matches!(
            check(good.replace("6.12.1-test", &"6".repeat(65))),
            Err(NoteError::Missing(_))
        ));
    }

    #[test]
    fn what_is_no_note_is_none() {
        let bytes = note("OSRELEASE=1\n");
        for (at, byte) in
            [(0, 12), (4, 0), (5, 0x11), (8, 1), (12, b'W'), (22, 1), (24, 0x1b), (24, 0xff)]
        {
            let mut bad = bytes.clone();
            bad[at] = byte;
            bad.resize(0x3000, 0);
            if at == 4 {
                bad[4..8].fill(0);
            }
            assert_eq!(Note::read(0, reader(&bad)), None, "{at}");
        }
        // It ends with the memory.
        assert_eq!(Note::read(0, reader(&bytes[..30])), None);
        assert_eq!(Note::read(u64::MAX - 10, reader(&bytes)), None);
    }

    proptest! {
        #[test]
        fn no_note_does_harm(lines in proptest::collection::vec(("[A-Z]{1,4}|SYMBOL\\(init_uts_ns\\)|SYMBOL\\(swapper_pg_dir\\)|NUMBER\\(phys_base\\)|OSRELEASE|OFFSET\\(uts_namespace.name\\)", "[-0-9a-f]{0,24}"), 0..8)) {
            let text: String = lines.iter().map(|(key, value)| format!("{key}={value}\n")).collect();
            let memory = memory(true);
            let _ = Note::of_text(0, text).check(reader(&memory));
        }
    }
}
