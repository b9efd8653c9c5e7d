// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A memory area (`struct vm_area_struct`): what it is, and what /proc calls it.

use crate::bytes::{Bytes, text};
use crate::kernel::{Kernel, KernelError};
use crate::paths::Paths;

use super::mapping::{MappedFile, Mapping};

/// The most bytes of an area that are read.
const MAX_LEN: u64 = 4096;

/// The longest name of memory without a file. A program may give one of 80 bytes.
const MAX_NAME: usize = 256;

const PAGE_SHIFT: u32 = 12;

/// Bits of a device's number (`MINORBITS`).
const MINOR_BITS: u32 = 20;

/// `super_block.s_magic` of overlayfs.
const OVERLAYFS: u64 = 0x794c_7630;

/// Values of `vsyscall_mode`: `EMULATE`, `XONLY`.
const EMULATE: u32 = 0;
const EXECUTE_ONLY: u32 = 1;

/// Where everything is in areas.
#[derive(Debug)]
pub(super) struct Areas<'a> {
    kernel: &'a Kernel<'a>,
    paths: Paths<'a>,
    len: u64,
    start: u64,
    end: u64,
    mm: u64,
    flags: u64,
    pgoff: u64,
    file: u64,
    ops: u64,
    private: u64,
    anon_name: Option<(u64, u64)>,
    /// Operations of the kernel's own mappings, and where those have their name.
    special: Vec<u64>,
    special_name: u64,
    inode: u64,
    sb: u64,
    dev: u64,
    ino: u64,
    /// Of a file that overlayfs opened: from the file to the path that the process knows.
    user_path: Option<(u64, u64)>,
    path: (u64, u64),
    d_inode: u64,
    d_sb: u64,
    s_magic: u64,
    start_brk: u64,
    brk: u64,
    start_stack: u64,
}

/// What a process's areas are called by.
pub(super) struct Names {
    start_brk: u64,
    brk: u64,
    start_stack: u64,
}

impl<'a> Areas<'a> {
    pub(super) fn new(kernel: &'a Kernel<'a>) -> Result<Self, KernelError> {
        let area = |member| kernel.offset("vm_area_struct", member);
        let mm = |member| kernel.offset("mm_struct", member);
        let file = |member| kernel.offset("file", member);
        let backing = |member| kernel.offset("backing_file", member);
        let anon_name =
            || Some((area("anon_name").ok()?, kernel.offset("anon_vma_name", "name").ok()?));
        let user_path =
            || Some((backing("user_path.mnt").ok()?, backing("user_path.dentry").ok()?));
        Ok(Self {
            kernel,
            paths: Paths::new(kernel)?,
            len: kernel.size_of("vm_area_struct")?.min(MAX_LEN),
            start: area("vm_start")?,
            end: area("vm_end")?,
            mm: area("vm_mm")?,
            flags: area("vm_flags")?,
            pgoff: area("vm_pgoff")?,
            file: area("vm_file")?,
            ops: area("vm_ops")?,
            private: area("vm_private_data")?,
            anon_name: anon_name(),
            special: kernel.symbol("special_mapping_vmops").into_iter().collect(),
            special_name: kernel.offset("vm_special_mapping", "name")?,
            inode: file("f_inode")?,
            sb: kernel.offset("inode", "i_sb")?,
            dev: kernel.offset("super_block", "s_dev")?,
            ino: kernel.offset("inode", "i_ino")?,
            user_path: user_path(),
            path: (file("f_path.mnt")?, file("f_path.dentry")?),
            d_inode: kernel.offset("dentry", "d_inode")?,
            d_sb: kernel.offset("dentry", "d_sb")?,
            s_magic: kernel.offset("super_block", "s_magic")?,
            start_brk: mm("start_brk")?,
            brk: mm("brk")?,
            start_stack: mm("start_stack")?,
        })
    }

    /// What the areas of the process with this `mm_struct` are called by.
    pub(super) fn names(&self, mm: u64) -> Result<Names, KernelError> {
        let word = |at: u64| self.kernel.read_u64(mm.wrapping_add(at));
        Ok(Names {
            start_brk: word(self.start_brk)?,
            brk: word(self.brk)?,
            start_stack: word(self.start_stack)?,
        })
    }

    /// First address, and the one after the last; an error where they make no sense.
    pub(super) fn range(&self, gva: u64) -> Result<(u64, u64), KernelError> {
        let word = |at: u64| self.kernel.read_u64(gva.wrapping_add(at));
        let (start, end) = (word(self.start)?, word(self.end)?);
        if start >= end || !is_page(start) || !is_page(end) {
            return Err(malformed(gva));
        }
        Ok((start, end))
    }

    /// The area at `gva` of the process with this `mm_struct`.
    pub(super) fn read(&self, gva: u64, mm: u64, names: &Names) -> Result<Mapping, KernelError> {
        let mut bytes = Bytes::zeroed(self.len);
        self.kernel.read(gva, bytes.as_mut())?;
        let (start, end) = (bytes.u64(self.start), bytes.u64(self.end));
        // The memory of an area that was freed may hold anything.
        if start >= end || !is_page(start) || !is_page(end) || bytes.u64(self.mm) != mm {
            return Err(malformed(gva));
        }
        let mut mapping =
            Mapping { start, end, flags: bytes.u64(self.flags), ..Mapping::default() };
        let damaged = |error: KernelError| if error.is_local() { Ok(true) } else { Err(error) };
        match bytes.u64(self.file) {
            0 => match self.label(&bytes, &mapping, names) {
                Ok(label) => mapping.label = label,
                Err(error) => mapping.is_damaged = damaged(error)?,
            },
            file => {
                mapping.offset = bytes.u64(self.pgoff) << PAGE_SHIFT;
                match self.mapped(file) {
                    Ok(file) => mapping.file = Some(file),
                    Err(error) => mapping.is_damaged = damaged(error)?,
                }
            }
        }
        Ok(mapping)
    }

    fn mapped(&self, file: u64) -> Result<MappedFile, KernelError> {
        let word = |base: u64, at: u64| self.kernel.read_u64(base.wrapping_add(at));
        let (mnt, dentry, inode) = match self.overlaid(file) {
            Some((mnt, dentry)) => (mnt, dentry, word(dentry, self.d_inode)?),
            None => (word(file, self.path.0)?, word(file, self.path.1)?, word(file, self.inode)?),
        };
        let dev = self.kernel.read_u32(word(inode, self.sb)?.wrapping_add(self.dev))?;
        Ok(MappedFile {
            major: dev >> MINOR_BITS,
            minor: dev & ((1 << MINOR_BITS) - 1),
            inode: word(inode, self.ino)?,
            path: self.paths.of(mnt, dentry)?,
        })
    }

    /// The path in an overlay that the file of another file system is mapped for (`struct
    /// backing_file`, since 6.5). The flag for it differs between kernels, and no type has it: a
    /// path of overlayfs is the sign.
    fn overlaid(&self, file: u64) -> Option<(u64, u64)> {
        let word = |base: u64, at: u64| self.kernel.read_u64(base.wrapping_add(at)).ok();
        let (mnt, dentry) = self.user_path?;
        let (mnt, dentry) = (word(file, mnt)?, word(file, dentry)?);
        let is_overlay = word(word(dentry, self.d_sb)?, self.s_magic)? == OVERLAYFS;
        is_overlay.then_some((mnt, dentry))
    }

    /// The kernel's name for an area without a file.
    fn label(
        &self,
        area: &Bytes,
        mapping: &Mapping,
        names: &Names,
    ) -> Result<Option<String>, KernelError> {
        let name = |gva| match text(&self.kernel.read_cstr(gva, MAX_NAME)?) {
            name if name.is_empty() => Err(malformed(gva)),
            name => Ok(name),
        };
        if self.special.contains(&area.u64(self.ops)) {
            let place = area.u64(self.private).wrapping_add(self.special_name);
            return name(self.kernel.read_u64(place)?).map(Some);
        }
        if mapping.start < names.brk && mapping.end > names.start_brk {
            return Ok(Some("[heap]".to_owned()));
        }
        if (mapping.start..=mapping.end).contains(&names.start_stack) {
            return Ok(Some("[stack]".to_owned()));
        }
        match self.anon_name.map(|(at, name)| (area.u64(at), name)) {
            Some((given, at)) if given != 0 => {
                Ok(Some(format!("[anon:{}]", name(given.wrapping_add(at))?)))
            }
            _ => Ok(None),
        }
    }

    /// The page of old system calls, which belongs to no process and is there in each, unless the
    /// kernel has none.
    pub(super) fn gate(&self) -> Result<Option<Mapping>, KernelError> {
        let (Ok(gate), Ok(mode)) =
            (self.kernel.symbol("gate_vma"), self.kernel.symbol("vsyscall_mode"))
        else {
            return Ok(None);
        };
        if !matches!(self.kernel.read_u32(mode)?, EMULATE | EXECUTE_ONLY) {
            return Ok(None);
        }
        let (start, end) = self.range(gate)?;
        let flags = self.kernel.read_u64(gate.wrapping_add(self.flags))?;
        Ok(Some(Mapping {
            start,
            end,
            flags,
            label: Some("[vsyscall]".to_owned()),
            ..Mapping::default()
        }))
    }
}

/// Whether an address is the first of a page.
pub(super) fn is_page(at: u64) -> bool {
    at.trailing_zeros() >= PAGE_SHIFT
}

fn malformed(gva: u64) -> KernelError {
    KernelError::Malformed { what: "the memory area".to_owned(), gva }
}
