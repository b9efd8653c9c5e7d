// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A mapping of a process.

use crate::paths::FilePath;

/// Bits of `vm_area_struct.vm_flags`.
const VM_READ: u64 = 1;
const VM_WRITE: u64 = 2;
const VM_EXEC: u64 = 4;
const VM_MAYSHARE: u64 = 0x80;

/// Neighbouring addresses of a process that have the same backing and the same permissions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mapping {
    /// First address.
    pub start: u64,
    /// The address after the last.
    pub end: u64,
    /// `vm_area_struct.vm_flags`.
    pub flags: u64,
    /// Offset of `start` in the file; 0 without a file.
    pub offset: u64,
    /// The file that is mapped.
    pub file: Option<MappedFile>,
    /// The kernel's name for memory without a file: `[heap]`, `[stack]`, `[vdso]`, `[anon:NAME]`
    /// and the like. It may have control characters.
    pub label: Option<String>,
    /// Whether the file or the name cannot be read, or nothing but the addresses.
    pub is_damaged: bool,
}

/// The file of a mapping.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MappedFile {
    /// Device of the file's file system.
    pub major: u32,
    /// The same.
    pub minor: u32,
    /// Inode number.
    pub inode: u64,
    /// Its path.
    pub path: FilePath,
}

impl Mapping {
    /// Whether loads are allowed.
    pub fn is_readable(&self) -> bool {
        self.flags & VM_READ != 0
    }

    /// Whether stores are allowed.
    pub fn is_writable(&self) -> bool {
        self.flags & VM_WRITE != 0
    }

    /// Whether instructions may be fetched.
    pub fn is_executable(&self) -> bool {
        self.flags & VM_EXEC != 0
    }

    /// Whether stores reach the file, or other processes.
    pub fn is_shared(&self) -> bool {
        self.flags & VM_MAYSHARE != 0
    }

    /// As /proc shows them: `rw-p`.
    pub fn permissions(&self) -> String {
        let flag = |is_set, letter| if is_set { letter } else { '-' };
        let shared = if self.is_shared() { 's' } else { 'p' };
        let all =
            [(self.is_readable(), 'r'), (self.is_writable(), 'w'), (self.is_executable(), 'x')];
        all.into_iter().map(|(is_set, letter)| flag(is_set, letter)).chain([shared]).collect()
    }
}
