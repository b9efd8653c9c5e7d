// SPDX-License-Identifier: Apache-2.0 OR MIT
//! How BTF lies in memory: `struct btf_header`, `struct btf_type` and what follows each
//! (`include/uapi/linux/btf.h`), with the fields as wide as 7.3 has them; earlier kernels have
//! zeros there.

/// Bytes of the header that all versions have.
pub(super) const HEADER: usize = 24;

/// Bytes of `struct btf_type`.
const TYPE: usize = 12;

const MAGIC: u16 = 0xeb9f;
const VERSION: u8 = 1;

/// Why BTF cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum BtfError {
    /// It is not all in memory.
    #[error("the kernel's BTF cannot be read at gva {gva:#x}")]
    Unreadable {
        /// First address of what was to be read.
        gva: u64,
    },
    /// It is something else.
    #[error("where the kernel's BTF should be, there is something else")]
    Magic,
    /// It makes no sense.
    #[error("the kernel's BTF makes no sense: {0}")]
    Malformed(&'static str),
    /// It has a kind of type that this version of the library does not know, or is damaged.
    #[error(
        "type {id} of the kernel's BTF has the unknown kind {kind}: the memory is damaged, or a later version of this program knows it"
    )]
    Kind {
        /// The type.
        id: u64,
        /// Its kind.
        kind: u8,
    },
}

/// Where types and strings are, in bytes from the begin of the blob.
#[derive(Clone, Copy, Debug)]
pub(super) struct Header {
    types: (u64, u64),
    strings: (u64, u64),
}

impl Header {
    pub(super) fn parse(blob: &[u8]) -> Result<Self, BtfError> {
        let word = |at: usize| Some(u32::from_le_bytes(*blob.get(at..)?.first_chunk()?));
        let words = || Some([word(4)?, word(8)?, word(12)?, word(16)?, word(20)?]);
        let [len, type_off, type_len, str_off, str_len] =
            words().ok_or(BtfError::Magic)?.map(u64::from);
        if !blob.starts_with(&MAGIC.to_le_bytes()) {
            return Err(BtfError::Magic);
        }
        if blob.get(2) != Some(&VERSION) {
            return Err(BtfError::Malformed("its version"));
        }
        if len < HEADER as u64 || type_off > 1 << 30 || str_off > 1 << 30 {
            return Err(BtfError::Malformed("its header"));
        }
        let section = |off: u64, section_len: u64| (len + off, len + off + section_len);
        Ok(Self { types: section(type_off, type_len), strings: section(str_off, str_len) })
    }

    /// Bytes up to the end of what is needed.
    pub(super) fn len(&self) -> u64 {
        self.types.1.max(self.strings.1)
    }

    /// First byte of the types, and the one after the last.
    pub(super) fn types(&self) -> (usize, usize) {
        in_memory(self.types)
    }

    pub(super) fn strings(&self) -> (usize, usize) {
        in_memory(self.strings)
    }
}

fn in_memory((start, end): (u64, u64)) -> (usize, usize) {
    let place = |at| usize::try_from(at).unwrap_or(usize::MAX);
    (place(start), place(end))
}

/// Kind of a type. All types that only refer to another one are the same kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Int,
    Pointer,
    Array,
    Struct,
    Union,
    Enum,
    Enum64,
    Float,
    /// typedef, volatile, const, restrict, type tag.
    Reference,
    /// Forward declarations, functions, variables, sections, tags of declarations.
    Other,
    Unknown,
}

impl Kind {
    fn of(number: u8) -> Self {
        match number {
            1 => Self::Int,
            2 => Self::Pointer,
            3 => Self::Array,
            4 => Self::Struct,
            5 => Self::Union,
            6 => Self::Enum,
            19 => Self::Enum64,
            16 => Self::Float,
            8..=11 | 18 => Self::Reference,
            7 | 12..=15 | 17 => Self::Other,
            _ => Self::Unknown,
        }
    }

    /// Whether a type of this kind is looked up by its name.
    pub(super) fn is_looked_up(self) -> bool {
        matches!(
            self,
            Self::Int
                | Self::Struct
                | Self::Union
                | Self::Enum
                | Self::Enum64
                | Self::Float
                | Self::Reference
        )
    }
}

/// A member of a structure as it lies in BTF.
pub(super) struct RawMember {
    pub(super) name_offset: u32,
    pub(super) id: u32,
    /// Bits from the begin of the structure.
    pub(super) bit_offset: u32,
    /// Bits of a bit field; 0 for other members.
    pub(super) bit_size: u32,
}

/// A type as it lies in BTF.
#[derive(Clone, Copy)]
pub(super) struct Reader<'a> {
    name_offset: u32,
    info: u32,
    size_or_type: u32,
    /// All that follows the type.
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Option<Self> {
        let (head, rest) = bytes.split_first_chunk::<TYPE>()?;
        let [name_offset, info, size_or_type] = words(head)?;
        Some(Self { name_offset, info, size_or_type, rest })
    }

    pub(super) fn name_offset(&self) -> u32 {
        self.name_offset
    }

    pub(super) fn size_or_type(&self) -> u32 {
        self.size_or_type
    }

    /// BTF_INFO_KIND.
    pub(super) fn kind_number(&self) -> u8 {
        self.info.to_le_bytes()[3] & 0x7f
    }

    pub(super) fn kind(&self) -> Kind {
        Kind::of(self.kind_number())
    }

    /// BTF_INFO_KFLAG.
    fn has_flag(&self) -> bool {
        self.info >> 31 != 0
    }

    /// BTF_INFO_VLEN.
    fn count(&self) -> usize {
        (self.info & 0x00ff_ffff) as usize
    }

    /// Bytes of the type with what follows it; `None` for an unknown kind.
    pub(super) fn len(&self) -> Option<usize> {
        let more = match self.kind_number() {
            // INT, VAR, DECL_TAG
            1 | 14 | 17 => 4,
            // ARRAY
            3 => 12,
            // STRUCT, UNION, DATASEC, ENUM64
            4 | 5 | 15 | 19 => 12 * self.count(),
            // ENUM, FUNC_PROTO
            6 | 13 => 8 * self.count(),
            2 | 7..=12 | 16 | 18 => 0,
            _ => return None,
        };
        Some(TYPE + more)
    }

    /// Type and number of an array's elements.
    pub(super) fn array(&self) -> Option<(u32, u32)> {
        let [element, _, len] = words(self.rest.first_chunk::<12>()?)?;
        Some((element, len))
    }

    /// The members of a structure or union, as many as there is room for.
    pub(super) fn members(&self) -> impl Iterator<Item = RawMember> + use<'a> {
        let (members, _) = self.rest.as_chunks::<12>();
        let is_bits = self.has_flag();
        members.iter().take(self.count()).filter_map(words).map(move |[name_offset, id, offset]| {
            let (bit_offset, bit_size) =
                if is_bits { (offset & 0x00ff_ffff, offset >> 24) } else { (offset, 0) };
            RawMember { name_offset, id, bit_offset, bit_size }
        })
    }

    /// Name and value of each enumerator.
    pub(super) fn enumerators(&self) -> impl Iterator<Item = (u32, i64)> + use<'a> {
        let is_wide = self.kind() == Kind::Enum64;
        let is_signed = self.has_flag();
        self.rest.chunks_exact(if is_wide { 12 } else { 8 }).take(self.count()).filter_map(
            move |entry| {
                let word = |at: usize| Some(u32::from_le_bytes(*entry.get(at..)?.first_chunk()?));
                let low = word(4)?;
                let value = match is_wide {
                    true => (u64::from(word(8)?) << 32 | u64::from(low)).cast_signed(),
                    false if is_signed => low.cast_signed().into(),
                    false => low.into(),
                };
                Some((word(0)?, value))
            },
        )
    }
}

fn words(bytes: &[u8; 12]) -> Option<[u32; 3]> {
    let (words, _) = bytes.as_chunks::<4>();
    Some([0, 1, 2].map(|at| words.get(at).map_or(0, |word| u32::from_le_bytes(*word))))
}
