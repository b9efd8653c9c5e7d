// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A kernel: its note, its address space, its symbols and its types.

use std::sync::{Arc, OnceLock};

use kvmmem_memory::{Memory, MemoryError};

use super::error::KernelError;
use crate::btf::{BtfError, Member, TypeId, Types};
use crate::space::Space;
use crate::symbols::{Symbols, TableError};
use crate::vmcoreinfo::Note;

/// A kernel that runs, or ran, in a guest.
///
/// Symbols and types are read when they are first asked for.
#[derive(Debug)]
pub struct Kernel<'m> {
    pub(super) note: Note,
    pub(super) space: Space<'m>,
    symbols: OnceLock<Result<Symbols, Arc<TableError>>>,
    types: OnceLock<Result<Types, Arc<BtfError>>>,
}

impl<'m> Kernel<'m> {
    /// The kernel that left this note, which [`crate::search::Notes`] finds.
    ///
    /// # Errors
    /// [`KernelError::Note`] if the note lacks the place of the page tables.
    pub fn of_note(memory: &'m dyn Memory, note: Note) -> Result<Self, KernelError> {
        let root = note.address_space().ok_or(KernelError::Note)?;
        let encryption = note.number("NUMBER(sme_mask)").unwrap_or(0).cast_unsigned();
        let space = Space::new(memory, root, encryption);
        Ok(Self { note, space, symbols: OnceLock::new(), types: OnceLock::new() })
    }

    /// A kernel whose note and symbols are known.
    pub(super) fn with_symbols(note: Note, space: Space<'m>, symbols: Symbols) -> Self {
        Self { note, space, symbols: OnceLock::from(Ok(symbols)), types: OnceLock::new() }
    }

    /// The note: the kernel's release, build id and more. For a kernel without one it is made from
    /// the symbols and the image, and has no address.
    pub fn note(&self) -> &Note {
        &self.note
    }

    /// Whether the kernel is still in memory: its note, and page tables that lead to its name. Once
    /// the guest was restarted and another kernel has taken that memory, nothing that was read
    /// of this one is to be trusted.
    ///
    /// # Errors
    /// [`MemoryError::Ended`]: nothing can be read any more.
    pub fn is_in_memory(&self) -> Result<bool, MemoryError> {
        let memory = self.space.memory();
        let read = |gpa: u64, buf: &mut [u8]| memory.read_at(gpa, buf);
        let is_there = match self.note.gpa {
            Some(gpa) => Note::read(gpa, read).is_some_and(|note| note == self.note),
            None => true,
        };
        if is_there && self.note.check(read).is_ok() {
            return Ok(true);
        }
        match memory.read_at(self.note.gpa.unwrap_or(0), &mut [0]) {
            Err(error) if !error.is_local() => Err(error),
            _ => Ok(false),
        }
    }

    /// The kernel's own address space.
    pub fn space(&self) -> &Space<'m> {
        &self.space
    }

    /// The address space of a process; `pgd` is the guest-virtual address of its outermost table
    /// (`mm_struct.pgd`).
    ///
    /// # Errors
    /// [`KernelError::Read`].
    pub fn process_space(&self, pgd: u64) -> Result<Space<'m>, KernelError> {
        let found = self.space.translate(pgd).map_err(|source| KernelError::read(pgd, source))?;
        Ok(self.space.with_root(found.gpa))
    }

    /// The kernel's symbols.
    ///
    /// # Errors
    /// [`KernelError::Symbols`].
    pub fn symbols(&self) -> Result<&Symbols, KernelError> {
        let read = || Symbols::read(&self.space, &self.note).map_err(Arc::new);
        self.symbols
            .get_or_init(read)
            .as_ref()
            .map_err(|error| KernelError::Symbols(Arc::clone(error)))
    }

    /// The kernel's types.
    ///
    /// # Errors
    /// [`KernelError::NoTypes`] for a kernel without BTF, [`KernelError::Types`] for one whose BTF
    /// cannot be used; without types only the log is left, for which the note has all.
    pub fn types(&self) -> Result<&Types, KernelError> {
        let start = self.symbols()?.get("__start_BTF").ok_or(KernelError::NoTypes)?;
        let read = || Types::read(start, |gva, buf| self.space.read(gva, buf)).map_err(Arc::new);
        self.types.get_or_init(read).as_ref().map_err(|error| KernelError::Types(Arc::clone(error)))
    }

    /// The guest-virtual address of a symbol.
    ///
    /// # Errors
    /// [`KernelError::NoSymbol`], or as [`Kernel::symbols`].
    pub fn symbol(&self, name: &str) -> Result<u64, KernelError> {
        self.symbols()?.get(name).ok_or_else(|| KernelError::NoSymbol { name: name.to_owned() })
    }

    /// Where a member is in a structure, by its path, for example `f_path.dentry` of `file`.
    ///
    /// # Errors
    /// [`KernelError::Member`], or as [`Kernel::types`].
    pub fn member(&self, structure: &str, path: &str) -> Result<Member, KernelError> {
        self.types()?.member(structure, path).map_err(KernelError::Member)
    }

    /// Bytes from the begin of a structure to a member.
    ///
    /// # Errors
    /// As [`Kernel::member`].
    pub fn offset(&self, structure: &str, path: &str) -> Result<u64, KernelError> {
        Ok(self.member(structure, path)?.offset)
    }

    /// Bytes of a type.
    ///
    /// # Errors
    /// [`KernelError::NoType`], or as [`Kernel::types`].
    pub fn size_of(&self, name: &str) -> Result<u64, KernelError> {
        let (types, id) = self.type_named(name)?;
        types.size(id).ok_or_else(|| KernelError::NoType { name: name.to_owned() })
    }

    /// The value that a note has for a structure under this key, `OFFSET(structure.member)` or
    /// `SIZE(structure)`, computed from the types.
    ///
    /// # Errors
    /// As [`Kernel::member`] and [`Kernel::size_of`].
    pub(crate) fn of_key(&self, key: &str) -> Result<u64, KernelError> {
        let inner = |kind| key.strip_prefix(kind).and_then(|rest| rest.strip_suffix(')'));
        if let Some((structure, member)) = inner("OFFSET(").and_then(|path| path.split_once('.')) {
            return self.offset(structure, member);
        }
        self.size_of(inner("SIZE(").unwrap_or(key))
    }

    /// The value of an enumerator.
    ///
    /// # Errors
    /// [`KernelError::NoType`], or as [`Kernel::types`].
    pub fn enumerator(&self, name: &str) -> Result<i64, KernelError> {
        self.types()?.enumerator(name).ok_or_else(|| KernelError::NoType { name: name.to_owned() })
    }

    pub(super) fn type_named(&self, name: &str) -> Result<(&Types, TypeId), KernelError> {
        let types = self.types()?;
        let id = types.find(name).ok_or_else(|| KernelError::NoType { name: name.to_owned() })?;
        Ok((types, id))
    }
}
