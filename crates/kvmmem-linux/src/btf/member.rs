// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where a member of a structure is, by its path: `signal` of `task_struct`, or `f_path.dentry` of
//! `file`.

use super::layout::{Kind, RawMember};
use super::types::{TypeId, Types};

/// How deep structures without a name, which lie in structures, are searched.
const MAX_DEPTH: usize = 16;

/// The most members that one look-up may look at. The kernel's largest structure has a few hundred.
const MAX_MEMBERS: usize = 1 << 20;

/// A member's place in the structure from which its path begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Bytes from the begin of the structure. Of a bit field, of the first byte that has a bit of
    /// it.
    pub offset: u64,
    /// Size in bytes; of a bit field, of the bytes that hold its bits. 0 where the type gives none,
    /// as for a flexible array.
    pub size: u64,
    /// Which bits, of a bit field.
    pub bits: Option<Bits>,
    /// The member's type.
    pub id: TypeId,
}

/// The place of a bit field in the bytes of a [`Member`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bits {
    /// Bits below it.
    pub shift: u32,
    /// How many bits it has.
    pub count: u32,
}

impl Bits {
    /// The field's value in that of its bytes.
    pub fn of(&self, value: u64) -> u64 {
        let mask = if self.count >= 64 { u64::MAX } else { (1 << self.count) - 1 };
        value.checked_shr(self.shift).unwrap_or(0) & mask
    }
}

/// Why a member was not found.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum MemberError {
    /// There is no such type.
    #[error("this kernel has no type {name}")]
    Type {
        /// Its name.
        name: String,
    },
    /// The type has no such member.
    #[error("this kernel's {name} has no member {path}")]
    Member {
        /// The type.
        name: String,
        /// The path.
        path: String,
    },
}

impl Types {
    /// Finds a member by its path from the structure or union `name`. Members of structures without
    /// a name belong to the structure around them, as in C.
    ///
    /// # Errors
    /// [`MemberError`].
    pub fn member(&self, name: &str, path: &str) -> Result<Member, MemberError> {
        let id = self.find(name).ok_or_else(|| MemberError::Type { name: name.to_owned() })?;
        self.member_of(id, path)
            .ok_or_else(|| MemberError::Member { name: name.to_owned(), path: path.to_owned() })
    }

    /// Finds a member by its path from the structure or union with this number.
    pub fn member_of(&self, id: TypeId, path: &str) -> Option<Member> {
        let mut budget = MAX_MEMBERS;
        let mut found = Member { offset: 0, size: 0, bits: None, id };
        for part in path.split('.') {
            let (bit_offset, member) = self.search(found.id, part.as_bytes(), 0, &mut budget)?;
            // A bit field has no members.
            let base = if found.bits.is_none() { found.offset } else { return None };
            found = self.placed(base.checked_mul(8)?.checked_add(bit_offset)?, &member);
        }
        Some(found)
    }

    /// Bits from the begin of the structure `id` to its member `name`.
    fn search(
        &self,
        id: TypeId,
        name: &[u8],
        depth: usize,
        budget: &mut usize,
    ) -> Option<(u64, RawMember)> {
        let reader = self.get(self.resolve(id)?)?;
        if depth > MAX_DEPTH || !matches!(reader.kind(), Kind::Struct | Kind::Union) {
            return None;
        }
        for member in reader.members() {
            *budget = budget.checked_sub(1)?;
            let offset = u64::from(member.bit_offset);
            let found = self.string(member.name_offset);
            if found == name && !name.is_empty() {
                return Some((offset, member));
            }
            if found.is_empty()
                && let Some((inner, member)) = self.search(member.id, name, depth + 1, budget)
            {
                return Some((offset + inner, member));
            }
        }
        None
    }

    fn placed(&self, bit_offset: u64, member: &RawMember) -> Member {
        let (offset, id) = (bit_offset / 8, member.id);
        if member.bit_size == 0 {
            return Member { offset, size: self.size(id).unwrap_or(0), bits: None, id };
        }
        let (shift, count) = (u32::try_from(bit_offset % 8).unwrap_or(0), member.bit_size);
        let size = u64::from((shift + count).div_ceil(8));
        Member { offset, size, bits: Some(Bits { shift, count }), id }
    }
}
