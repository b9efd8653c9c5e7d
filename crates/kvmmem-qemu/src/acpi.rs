// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Checks a layout against the guest's own memory, by the tables that its firmware has left. Any
//! system may run in it.
//!
//! SeaBIOS and OVMF put the ACPI tables at the top of the RAM below 4 GiB, and both Linux and
//! Windows leave them there. They point to each other by guest-physical addresses and have
//! checksums. So if all of them are found at the file offsets that a layout says, then its
//! addresses are right up to there; and if they are near the end of the low RAM that the layout
//! says, then that end is right as well, for those that a machine may have lie far apart.

use crate::bytes::{u16_at, u32_at, u64_at};

/// How far below the end of low RAM the tables may be, bytes. OVMF puts some MiB of other things
/// above them.
const REACH: u64 = 64 << 20;

/// The largest table that is read, bytes: of those that list others or are one of a list, and of
/// the one that they end at. A guest may well have many lists of many tables that are all but
/// right.
const MAX_LISTED: u32 = 4096;
const MAX_TABLE: u32 = 1 << 20;

/// The most tables that the root table may list.
const MAX_TABLES: usize = 256;

/// The most places that look like the beginning that are looked at.
const MAX_CANDIDATES: usize = 64;

/// How much is searched at a time, bytes.
const CHUNK: usize = 1 << 20;

/// Bytes of a page.
const PAGE: usize = 4096;

/// Bytes of a table's header, and of the structure that all begins with, in its first version.
const HEADER: usize = 36;
const POINTER: usize = 20;

/// What all begins with.
const SIGNATURE: &[u8] = b"RSD PTR ";

/// Why a layout is not confirmed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum AcpiError {
    /// The tables were not found: the firmware has not run yet, there are none, or they are
    /// somewhere else.
    #[error("no ACPI tables were found below gpa {low_end:#x}")]
    NotFound {
        /// Where low RAM ends by the layout.
        low_end: u64,
    },
    /// Low RAM ends too far above the tables.
    #[error(
        "ACPI tables end at gpa {tables_end:#x}, too far below the end of low RAM at {low_end:#x}"
    )]
    Far {
        /// Where the tables end.
        tables_end: u64,
        /// Where low RAM ends by the layout.
        low_end: u64,
    },
}

/// Confirms that guest-physical addresses 0 to `low_end` are what `read` copies out, and that low
/// RAM ends there. Returns where the tables end. `read` gets zeroes to write over, and fails by
/// `None`.
pub fn verify(read: impl Fn(u64, &mut [u8]) -> Option<()>, low_end: u64) -> Result<u64, AcpiError> {
    let memory = Memory { read, end: low_end };
    let near = low_end.saturating_sub(REACH);
    let bios = memory.search(0xe0000, 0x10_0000);
    let extended = memory.read(0x40e, 2).map(|segment| u64::from(u16_at(&segment, 0)) << 4);
    let extended = extended.filter(|gpa| (0x400..0xa_0000).contains(gpa));
    let extended = extended.map(|gpa| memory.search(gpa, gpa + 1024)).unwrap_or_default();
    let tables_end = bios.into_iter().chain(extended).find_map(|gpa| memory.tables_end(gpa));
    let tables_end = tables_end.or_else(|| {
        memory.search(near, low_end).into_iter().find_map(|gpa| memory.tables_end(gpa))
    });
    match tables_end {
        None => Err(AcpiError::NotFound { low_end }),
        Some(tables_end) if tables_end < near => Err(AcpiError::Far { tables_end, low_end }),
        Some(tables_end) => Ok(tables_end),
    }
}

/// Low RAM. It is copied, for the guest may change it at any time.
struct Memory<R> {
    read: R,
    end: u64,
}

impl<R: Fn(u64, &mut [u8]) -> Option<()>> Memory<R> {
    fn read(&self, gpa: u64, len: usize) -> Option<Vec<u8>> {
        gpa.checked_add(len as u64).filter(|end| *end <= self.end)?;
        let mut bytes = vec![0; len];
        (self.read)(gpa, &mut bytes)?;
        Some(bytes)
    }

    /// Where the signature is, at multiples of 16 bytes in a range.
    fn search(&self, start: u64, end: u64) -> Vec<u64> {
        let mut found = Vec::new();
        let mut gpa = start;
        while gpa < end && found.len() < MAX_CANDIDATES {
            let len = usize::try_from(end - gpa).unwrap_or(CHUNK).min(CHUNK);
            let Some(bytes) = self.read(gpa, len) else { break };
            // Most pages are left at the first look.
            let pages = bytes
                .chunks(PAGE)
                .zip((gpa..).step_by(PAGE))
                .filter(|(page, _)| page.contains(&b'R'));
            let places = pages.flat_map(|(page, gpa)| page.chunks(16).zip((gpa..).step_by(16)));
            let hits = places.filter(|(chunk, _)| chunk.starts_with(SIGNATURE));
            found.extend(hits.map(|(_, gpa)| gpa).take(MAX_CANDIDATES));
            gpa += len as u64;
        }
        found
    }

    /// Where the tables end that a structure with the signature leads to, if all is as it must be.
    fn tables_end(&self, gpa: u64) -> Option<u64> {
        let pointer = self.read(gpa, HEADER)?;
        sums_to_zero(pointer.get(..POINTER)?).then_some(())?;
        let extended = u64_at(&pointer, 24);
        let is_extended = pointer.get(15).is_some_and(|revision| *revision >= 2) && extended != 0;
        if is_extended && !sums_to_zero(&pointer) {
            return None;
        }
        let (signature, root, width): (&[u8], u64, usize) = if is_extended {
            (b"XSDT", extended, 8)
        } else {
            (b"RSDT", u64::from(u32_at(&pointer, 16)), 4)
        };
        let (table, root_end) = self.table(root, signature, MAX_LISTED)?;
        let entries = table.get(HEADER..)?.chunks_exact(width).take(MAX_TABLES);
        let address =
            |entry: &[u8]| if width == 8 { u64_at(entry, 0) } else { u64::from(u32_at(entry, 0)) };
        let (fixed, fixed_end) =
            entries.map(address).find_map(|gpa| self.table(gpa, b"FACP", MAX_LISTED))?;
        let (_, differentiated_end) = self
            .table(u64::from(u32_at(&fixed, 40)), b"DSDT", MAX_TABLE)
            .or_else(|| self.table(u64_at(&fixed, 140), b"DSDT", MAX_TABLE))?;
        Some(root_end.max(fixed_end).max(differentiated_end))
    }

    /// A table of at most so many bytes with a signature and a right checksum, and where it ends.
    fn table(&self, gpa: u64, signature: &[u8], max: u32) -> Option<(Vec<u8>, u64)> {
        let header = self.read(gpa, HEADER)?;
        header.starts_with(signature).then_some(())?;
        let len = u32_at(&header, 4);
        let table = self.read(gpa, usize::try_from(len).ok().filter(|_| len <= max)?)?;
        (table.len() >= HEADER && sums_to_zero(&table)).then(|| (table, gpa + u64::from(len)))
    }
}

fn sums_to_zero(bytes: &[u8]) -> bool {
    bytes.iter().fold(0u8, |sum, byte| sum.wrapping_add(*byte)) == 0
}

#[cfg(test)]
pub(crate) mod tests {
    use std::os::fd::AsFd;

    use super::*;
    use proptest::prelude::*;
    use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
    use rustix::io::pwrite;

    fn sealed(mut bytes: Vec<u8>, at: usize) -> Vec<u8> {
        bytes[at] = 0;
        bytes[at] = bytes.iter().fold(0u8, |sum, byte| sum.wrapping_sub(*byte));
        bytes
    }

    fn table(signature: &[u8; 4], body: &[u8]) -> Vec<u8> {
        let mut bytes = signature.to_vec();
        bytes.extend(u32::try_from(HEADER + body.len()).unwrap().to_le_bytes());
        bytes.resize(HEADER, 7);
        bytes.extend(body);
        sealed(bytes, 9)
    }

    /// Writes tables as SeaBIOS does: the beginning below 1 MiB, all else at `gpa`. Returns where
    /// they end.
    pub(crate) fn write_tables(file: &impl AsFd, gpa: u32) -> u64 {
        let differentiated = table(b"DSDT", &[1; 100]);
        let mut body = vec![0; 240 - HEADER];
        body[4..8].copy_from_slice(&gpa.to_le_bytes());
        let fixed = table(b"FACP", &body);
        let root = table(b"RSDT", &[0xffff_f000, gpa + 0x1000].map(u32::to_le_bytes).concat());
        let mut pointer = b"RSD PTR \0BOCHS \0".to_vec();
        pointer.extend((gpa + 0x2000).to_le_bytes());
        let pointer = sealed(pointer, 8);
        for (at, bytes) in [
            (0xf_59e0, &pointer),
            (gpa, &differentiated),
            (gpa + 0x1000, &fixed),
            (gpa + 0x2000, &root),
        ] {
            pwrite(file, bytes, u64::from(at)).unwrap();
        }
        u64::from(gpa) + 0x2000 + root.len() as u64
    }

    /// Low RAM that is at the same places of a file.
    fn verify(file: &std::os::fd::OwnedFd, low_end: u64) -> Result<u64, AcpiError> {
        let read = |gpa, bytes: &mut [u8]| {
            let len = bytes.len();
            rustix::io::pread(file, bytes, gpa).ok().filter(|count| *count == len).map(|_| ())
        };
        super::verify(read, low_end)
    }

    fn memory(size: u64) -> std::os::fd::OwnedFd {
        let file = memfd_create("ram", MemfdFlags::CLOEXEC).unwrap();
        ftruncate(&file, size).unwrap();
        file
    }

    #[test]
    fn tables_confirm_the_end_that_they_are_near() {
        let file = memory(5 << 30);
        assert_eq!(verify(&file, 3 << 30), Err(AcpiError::NotFound { low_end: 3 << 30 }));
        let end = write_tables(&file, 0xbffe_0000);
        assert_eq!(verify(&file, 0xc000_0000), Ok(end));
        assert_eq!(
            verify(&file, 0xe000_0000),
            Err(AcpiError::Far { tables_end: end, low_end: 0xe000_0000 })
        );
        assert_eq!(verify(&file, 0x8000_0000), Err(AcpiError::NotFound { low_end: 0x8000_0000 }));
        // Behind the end of the file.
        assert_eq!(
            verify(&memory(1 << 20), 0xc000_0000),
            Err(AcpiError::NotFound { low_end: 0xc000_0000 })
        );
    }

    #[test]
    fn each_damaged_byte_is_noticed() {
        let file = memory(1 << 29);
        write_tables(&file, 0x1ffe_0000);
        for at in [0xf_59e8u64, 0xf_59f0, 0x1ffe_0050, 0x1ffe_1028, 0x1ffe_2025] {
            let mut byte = [0];
            rustix::io::pread(&file, &mut byte, at).unwrap();
            pwrite(&file, &[byte[0] ^ 0x10], at).unwrap();
            assert_eq!(
                verify(&file, 1 << 29),
                Err(AcpiError::NotFound { low_end: 1 << 29 }),
                "{at:#x}"
            );
            pwrite(&file, &byte, at).unwrap();
        }
        verify(&file, 1 << 29).unwrap();
    }

    #[test]
    fn the_beginning_is_found_near_the_top() {
        let file = memory(1 << 29);
        write_tables(&file, 0x1f00_0000);
        let mut pointer = [0; POINTER];
        rustix::io::pread(&file, &mut pointer, 0xf_59e0).unwrap();
        pwrite(&file, &[0; POINTER], 0xf_59e0).unwrap();
        pwrite(&file, &pointer, 0x1f77_e010).unwrap();
        verify(&file, 1 << 29).unwrap();
    }

    proptest! {
        #[test]
        fn any_memory_is_read_without_harm(
            bytes in proptest::collection::vec(any::<u8>(), 0..64),
            at in prop::sample::select(vec![0x40eu64, 0xf_59e8, 0xf_59f0, 0x1e_0000, 0x1e_1000, 0x1e_2000, 0x1e_2024]),
            low_end in prop::sample::select(vec![0u64, 0x1000, 0x10_0000, 0x20_0000, u64::MAX]),
        ) {
            let file = memory(0x20_0000);
            write_tables(&file, 0x1e_0000);
            pwrite(&file, &bytes, at).unwrap();
            let _ = verify(&file, low_end);
        }
    }
}
