// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What is wrong with a dump file.

use std::io;
use std::path::{Path, PathBuf};

use crate::range::Range;

/// A dump file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DumpError {
    /// It cannot be opened.
    #[error("cannot open {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// It cannot be read.
    #[error("cannot read {} at offset {offset:#x}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// First byte of what was to be read.
        offset: u64,
        /// What went wrong.
        #[source]
        source: io::Error,
    },
    /// It ends early.
    #[error(
        "{} is cut short: the memory at {range} ends at offset {needs:#x}, and the file at {len:#x}; copy or dump it again",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// The memory that is not all there.
        range: Range,
        /// How long the file must be, bytes.
        needs: u64,
        /// How long it is, bytes.
        len: u64,
    },
    /// Its headers make no sense.
    #[error("{} is not a dump that can be read: {what}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What makes no sense.
        what: &'static str,
    },
    /// It is no file, or has another format, and cannot be read in place.
    #[error("{} is {what}: {remedy}", path.display())]
    Foreign {
        /// The file.
        path: PathBuf,
        /// What it is.
        what: &'static str,
        /// How to get a file that can be read.
        remedy: &'static str,
    },
    /// It is a dump that was not finished.
    #[error("{} is an unfinished dump, as {} is beside it: go on with kvmmem dump --resume", path.display(), part.display())]
    Unfinished {
        /// The file.
        path: PathBuf,
        /// The file that says how far it is.
        part: PathBuf,
    },
    /// There is no memory in it.
    #[error("{} is empty, or no memory is in it: copy or dump it again", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}

/// Formats that are told from raw memory, by their first bytes.
const FOREIGN: [(&[u8], &str, &str); 8] = [
    (b"KDUMP   ", "a compressed kdump", "convert it with makedumpfile -E"),
    (b"DISKDUMP", "a compressed kdump", "convert it with makedumpfile -E"),
    (b"makedump", "a flattened kdump", "convert it with makedumpfile -R"),
    (b"QEVM", "a saved state of QEMU", "dump the running VM instead"),
    (b"Libvirt", "a saved state of libvirt", "restore the VM and dump it instead"),
    (b"\x28\xb5\x2f\xfd", "compressed by zstd", "unpack it with zstd -d"),
    (b"\x1f\x8b", "compressed by gzip", "unpack it with gunzip"),
    (b"\xfd7zXZ\0", "compressed by xz", "unpack it with unxz"),
];

impl DumpError {
    pub(super) fn read(path: &Path, offset: u64, source: io::Error) -> Self {
        Self::Read { path: path.to_owned(), offset, source }
    }

    pub(super) fn malformed(path: &Path, what: &'static str) -> Self {
        Self::Malformed { path: path.to_owned(), what }
    }

    /// The error for a file that begins like that, if it is of one of the formats that are known
    /// and not read.
    pub(super) fn foreign(path: &Path, magic: &[u8]) -> Option<Self> {
        let (_, what, remedy) = FOREIGN.into_iter().find(|(begin, ..)| magic.starts_with(begin))?;
        Some(Self::Foreign { path: path.to_owned(), what, remedy })
    }
}
