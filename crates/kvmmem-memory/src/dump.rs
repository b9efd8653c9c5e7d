// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Dump files: the memory of a virtual machine at an earlier time.
//!
//! | format | where a byte lies | known by |
//! |---|---|---|
//! | raw | at the offset that is its address; with a record of `kvmmem dump` beside it, only the record's ranges are RAM | nothing else |
//! | ELF core | in PT_LOAD segments, at p_paddr | `\x7fELF` |
//! | LiME | in ranges with a header of 32 bytes each | `EMiL` |
//!
//! A file may be larger than memory, and may shrink while it is read, which is an error. All that
//! it says of itself is checked against its length.

mod elf;
mod error;
mod file;
mod lime;
mod mapping;
mod notes;
mod record;
mod segment;

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use kvmmem_sys::foreign::Foreign;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use crate::error::MemoryError;
use crate::memory::Memory;
use crate::paging::ControlRegisters;
use crate::range::{Range, next_range};
pub use error::DumpError;
use file::{open, read_some};
use mapping::FileMapping;
pub use segment::Segment;

/// How a file holds memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file's bytes are the memory's.
    Raw,
    /// An ELF core of x86-64.
    Elf,
    /// What the Linux Memory Extractor writes.
    Lime,
}

/// The memory in a dump file.
#[derive(Debug)]
pub struct DumpFile {
    path: PathBuf,
    file: File,
    len: u64,
    mapping: FileMapping,
    format: Format,
    /// Ascending, disjoint.
    segments: Vec<Segment>,
    is_bare: bool,
}

impl DumpFile {
    /// Opens a dump of any format that [this module](self) lists.
    ///
    /// # Errors
    /// [`DumpError`]: what is wrong with the file, a file that was cut short among it.
    pub fn open(path: &Path) -> Result<Self, DumpError> {
        let (file, len) = open(path)?;
        let mut magic = [0; 8];
        let known =
            read_some(&file, 0, &mut magic).map_err(|source| DumpError::read(path, 0, source))?;
        let magic = magic.get(..known).unwrap_or_default();
        if let Some(error) = DumpError::foreign(path, magic) {
            return Err(error);
        }
        let mut is_bare = false;
        let (format, segments) = if magic.starts_with(&object::elf::ELFMAG) {
            (Format::Elf, elf::segments(path, &file, len)?)
        } else if magic.starts_with(&lime::MAGIC) {
            (Format::Lime, lime::segments(path, &file, len)?)
        } else {
            let recorded = record::segments(path)?;
            is_bare = recorded.is_none();
            let whole = Segment { range: Range { gpa: 0, len }, offset: 0 };
            (Format::Raw, recorded.unwrap_or_else(|| vec![whole]))
        };
        Ok(Self { is_bare, ..Self::new(path, file, len, format, segments)? })
    }

    /// Opens a file of raw memory whose layout is known, for example the file of a VMM's RAM: of
    /// QEMU's, what follows the PCI hole lies directly after what precedes it.
    ///
    /// # Errors
    /// As [`DumpFile::open`].
    pub fn open_raw(path: &Path, segments: &[Segment]) -> Result<Self, DumpError> {
        let (file, len) = open(path)?;
        Self::new(path, file, len, Format::Raw, segments.to_vec())
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// How the file holds memory.
    pub fn format(&self) -> Format {
        self.format
    }

    /// The record that would say where the RAM of a raw file lies, where there is none: each byte
    /// of the file is taken for that at its address, which is wrong for a copy of RAM that has
    /// a PCI hole.
    pub fn missing_record(&self) -> Option<PathBuf> {
        self.is_bare.then(|| record::path(&self.path))
    }

    /// Where the memory lies in the file: ascending, disjoint.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Where `len` bytes from `gpa` on are mapped into this process, and at which offset there, so
    /// that they can be searched in place. `None` where the file cannot be mapped, or does not have
    /// them in one piece. The first call, and the first large read, install a handler of SIGBUS,
    /// see [`kvmmem_sys::foreign`].
    pub fn mapped(&self, gpa: u64, len: u64) -> Option<(&Foreign, u64)> {
        let Segment { range, offset } = self.segment(gpa)?;
        let within = gpa.checked_sub(range.gpa)?;
        let fits = within.checked_add(len)? <= range.len;
        Some((self.mapping.get(&self.file, self.len).filter(|_| fits)?, offset + within))
    }

    /// The control registers of the vCPUs, in the order of their numbers. Only ELF cores have them,
    /// and not all: empty for others.
    ///
    /// # Errors
    /// [`DumpError`], where its notes are damaged.
    pub fn vcpus(&self) -> Result<Vec<ControlRegisters>, DumpError> {
        if self.format != Format::Elf {
            return Ok(Vec::new());
        }
        elf::vcpus(&self.path, &self.file, self.len)
    }

    fn new(
        path: &Path,
        file: File,
        len: u64,
        format: Format,
        mut segments: Vec<Segment>,
    ) -> Result<Self, DumpError> {
        for Segment { range, offset } in &segments {
            let ends = range.gpa.checked_add(range.len).and_then(|_| offset.checked_add(range.len));
            let needs =
                ends.ok_or_else(|| DumpError::malformed(path, "a range passes the last address"))?;
            if needs > len {
                return Err(DumpError::Truncated {
                    path: path.to_owned(),
                    range: *range,
                    needs,
                    len,
                });
            }
        }
        segments.sort_by_key(|segment| segment.range.gpa);
        // Cores of kdump have the kernel's image twice: by itself, and in the RAM that it lies in.
        let mut end = 0u64;
        for Segment { range, offset } in &mut segments {
            let skip = end.saturating_sub(range.gpa).min(range.len);
            *range = Range { gpa: range.gpa + skip, len: range.len - skip };
            *offset += skip;
            end = range.end().max(end);
        }
        segments.retain(|segment| segment.range.len > 0);
        if segments.is_empty() {
            return Err(DumpError::Empty { path: path.to_owned() });
        }
        let (path, mapping) = (path.to_owned(), FileMapping::default());
        Ok(Self { path, file, len, mapping, format, segments, is_bare: false })
    }

    /// The segment that has `gpa`, or the first after it.
    fn segment(&self, gpa: u64) -> Option<&Segment> {
        self.segments.get(self.segments.partition_point(|segment| segment.range.end() <= gpa))
    }

    /// The next range of the file that was written, at or after `offset`.
    fn data_in_file(&self, offset: u64) -> Result<Option<(u64, u64)>, MemoryError> {
        let data = match seek(&self.file, SeekFrom::Data(offset)) {
            Ok(start) => {
                let end = seek(&self.file, SeekFrom::Hole(start))
                    .map_err(|error| self.ended(start, error.into()))?;
                Some((start, end))
            }
            Err(Errno::NXIO) => None,
            // The file system does not tell.
            Err(_) => Some((offset, u64::MAX)),
        };
        // A file that was cut short has a hole from there on.
        let len =
            seek(&self.file, SeekFrom::End(0)).map_err(|error| self.ended(offset, error.into()))?;
        if len < self.len {
            return Err(self.ended(len, io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(data)
    }

    fn ended(&self, offset: u64, source: io::Error) -> MemoryError {
        MemoryError::Ended(Box::new(DumpError::read(&self.path, offset, source)))
    }
}

impl Memory for DumpFile {
    fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let (mut gpa, mut rest) = (gpa, buf);
        while !rest.is_empty() {
            let segment = self.segment(gpa).filter(|segment| segment.range.gpa <= gpa);
            let Segment { range, offset } = segment.ok_or(MemoryError::Hole { gpa })?;
            let there = usize::try_from(range.end() - gpa).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at_mut(rest.len().min(there));
            let at = offset + (gpa - range.gpa);
            if !self.mapping.read(&self.file, self.len, at, now) {
                self.file.read_exact_at(now, at).map_err(|source| MemoryError::Unreadable {
                    gpa,
                    source: Box::new(DumpError::read(&self.path, at, source)),
                })?;
            }
            gpa = gpa.saturating_add(now.len() as u64);
            rest = later;
        }
        Ok(())
    }

    fn ranges(&self) -> Result<Vec<Range>, MemoryError> {
        let mut ranges: Vec<Range> = Vec::new();
        for Segment { range, .. } in &self.segments {
            match ranges.last_mut() {
                Some(last) if last.end() == range.gpa => last.len += range.len,
                _ => ranges.push(*range),
            }
        }
        Ok(ranges)
    }

    fn data_from(&self, gpa: u64) -> Result<Option<Range>, MemoryError> {
        let first = self.segments.partition_point(|segment| segment.range.end() <= gpa);
        for Segment { range, offset } in self.segments.iter().skip(first) {
            let Some(Range { gpa: start, .. }) = next_range(std::slice::from_ref(range), gpa)
            else {
                continue;
            };
            let from = offset + (start - range.gpa);
            let end = offset + range.len;
            if let Some((data, hole)) = self.data_in_file(from)?
                && data < end
            {
                let gpa = range.gpa + (data.max(from) - offset);
                return Ok(Some(Range { gpa, len: range.gpa + (hole.min(end) - offset) - gpa }));
            }
        }
        Ok(None)
    }
}
