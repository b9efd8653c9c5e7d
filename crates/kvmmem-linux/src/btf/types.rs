// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The kernel's types, with an index by name.

use super::layout::{BtfError, HEADER, Header, Kind, Reader};
use crate::name_index::{MAX_SAME, NameIndex};

/// The number of a type. 0 is void.
pub type TypeId = u32;

/// The most bytes of a kernel's BTF. Debian's 7.3 has 5.3 MB.
const MAX_BYTES: usize = 64 << 20;

/// The longest name with its end (KSYM_NAME_LEN); what is longer counts as no name.
const MAX_NAME: usize = 512;

/// Bytes that are read at a time.
const STEP: usize = 1 << 20;

/// The most references that are followed from a type to the one it means.
const MAX_REFERENCES: usize = 64;

/// The kernel's types.
#[derive(Debug)]
pub struct Types {
    blob: Vec<u8>,
    header: Header,
    /// Where each type begins in the blob; the first is that of type 1.
    starts: Vec<u32>,
    /// Only types by whose names something is looked up.
    by_name: NameIndex,
}

impl Types {
    /// Reads BTF that begins at `start`, with `read`, which fills a buffer from an address.
    ///
    /// # Errors
    /// [`BtfError`].
    pub fn read<E>(
        start: u64,
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<Self, BtfError> {
        let mut head = [0; HEADER];
        read(start, &mut head).map_err(|_| BtfError::Unreadable { gva: start })?;
        let len = Header::parse(&head)?.len();
        if len > MAX_BYTES as u64 {
            return Err(BtfError::Malformed("its length"));
        }
        // Read in steps, so that a length that is a lie costs nothing.
        let mut blob = Vec::new();
        while (blob.len() as u64) < len {
            let done = blob.len();
            let step = usize::try_from(len - done as u64).unwrap_or(STEP).min(STEP);
            blob.resize(done + step, 0);
            let gva = start.wrapping_add(done as u64);
            let part = blob.get_mut(done..).unwrap_or_default();
            read(gva, part).map_err(|_| BtfError::Unreadable { gva })?;
        }
        Self::parse(blob)
    }

    /// Types of a blob, for example of a file `/sys/kernel/btf/vmlinux`.
    ///
    /// # Errors
    /// [`BtfError`].
    pub fn parse(blob: Vec<u8>) -> Result<Self, BtfError> {
        let header = Header::parse(&blob)?;
        let mut types = Self { blob, header, starts: Vec::new(), by_name: NameIndex::default() };
        let (mut by_name, (mut at, end)) = (NameIndex::default(), types.header.types());
        if end > types.blob.len() || types.header.strings().1 > types.blob.len() {
            return Err(BtfError::Malformed("its length"));
        }
        while at < end {
            let reader = types.at(at).ok_or(BtfError::Malformed("a type passes its end"))?;
            let (start, id) = (u32::try_from(at), types.starts.len() as u64 + 1);
            let name =
                if reader.kind().is_looked_up() { types.string(reader.name_offset()) } else { b"" };
            if let (Ok(id), false) = (u32::try_from(id), name.is_empty()) {
                by_name.add(name, id);
            }
            at += reader.len().ok_or_else(|| BtfError::Kind { id, kind: reader.kind_number() })?;
            types.starts.push(start.map_err(|_| BtfError::Malformed("its length"))?);
        }
        if at != end {
            return Err(BtfError::Malformed("a type passes its end"));
        }
        by_name.sort();
        Ok(Self { by_name, ..types })
    }

    /// How many types there are.
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether there is no type.
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The structure, union, enumeration, typedef or base type with this name; of several, at most
    /// 4,096, a structure or union first.
    pub fn find(&self, name: &str) -> Option<TypeId> {
        let ids = self.by_name.candidates(name.as_bytes());
        let ids = ids.filter(|id| self.name(*id) == name.as_bytes()).take(MAX_SAME);
        ids.min_by_key(|id| {
            let kind = self.get(*id).map(|reader| reader.kind());
            (!matches!(kind, Some(Kind::Struct | Kind::Union)), *id)
        })
    }

    /// A type's name as the kernel has it; empty where it has none.
    pub fn name(&self, id: TypeId) -> &[u8] {
        self.get(id).map_or(b"", |reader| self.string(reader.name_offset()))
    }

    /// Bytes of a type.
    pub fn size(&self, id: TypeId) -> Option<u64> {
        let (mut id, mut count) = (id, 1u64);
        for _ in 0..MAX_REFERENCES {
            id = self.resolve(id)?;
            let reader = self.get(id)?;
            let size = match reader.kind() {
                Kind::Pointer => 8,
                Kind::Array => {
                    let (element, len) = reader.array()?;
                    count = count.checked_mul(len.into())?;
                    id = element;
                    continue;
                }
                Kind::Int
                | Kind::Struct
                | Kind::Union
                | Kind::Enum
                | Kind::Enum64
                | Kind::Float => u64::from(reader.size_or_type()),
                _ => return None,
            };
            return count.checked_mul(size);
        }
        None
    }

    /// The value of the first enumerator with this name in any enumeration.
    pub fn enumerator(&self, name: &str) -> Option<i64> {
        let readers = self.starts.iter().filter_map(|start| self.at(*start as usize));
        readers.filter(|reader| matches!(reader.kind(), Kind::Enum | Kind::Enum64)).find_map(
            |reader| {
                let mut values = reader.enumerators();
                values
                    .find(|(offset, _)| self.string(*offset) == name.as_bytes())
                    .map(|(_, value)| value)
            },
        )
    }

    /// The type that a typedef or a qualified type means.
    pub(super) fn resolve(&self, id: TypeId) -> Option<TypeId> {
        let mut id = id;
        for _ in 0..MAX_REFERENCES {
            let reader = self.get(id)?;
            if reader.kind() != Kind::Reference {
                return Some(id);
            }
            id = reader.size_or_type();
        }
        None
    }

    pub(super) fn get(&self, id: TypeId) -> Option<Reader<'_>> {
        let index = usize::try_from(id).ok()?.checked_sub(1)?;
        self.at(*self.starts.get(index)? as usize)
    }

    fn at(&self, start: usize) -> Option<Reader<'_>> {
        Reader::new(self.blob.get(start..self.header.types().1)?)
    }

    pub(super) fn string(&self, offset: u32) -> &[u8] {
        let (start, end) = self.header.strings();
        let text = self.blob.get(start..end).and_then(|strings| strings.get(offset as usize..));
        let text = text.unwrap_or_default();
        let text = text.get(..MAX_NAME).unwrap_or(text);
        text.get(..memchr::memchr(0, text).unwrap_or(0)).unwrap_or_default()
    }
}
