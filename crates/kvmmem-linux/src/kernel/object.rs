// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A structure of the kernel, copied whole: one read for all its members, which were in memory at
//! about the same time.

use super::error::KernelError;
use super::guest_kernel::Kernel;
use crate::btf::{Member, TypeId};

/// The largest structure that is copied, bytes. `task_struct` has some 10 KiB.
const MAX_SIZE: u64 = 1 << 16;

/// A copy of a structure.
#[derive(Clone)]
pub struct Object<'k> {
    kernel: &'k Kernel<'k>,
    id: TypeId,
    gva: u64,
    bytes: Vec<u8>,
}

impl Kernel<'_> {
    /// Copies the structure of type `name` at `gva`.
    ///
    /// # Errors
    /// [`KernelError::NoType`], [`KernelError::Read`], or as [`Kernel::types`].
    pub fn object(&self, name: &str, gva: u64) -> Result<Object<'_>, KernelError> {
        let (types, id) = self.type_named(name)?;
        let size = types.size(id).filter(|size| *size <= MAX_SIZE);
        let size = size.and_then(|size| usize::try_from(size).ok());
        let mut bytes = vec![0; size.ok_or_else(|| KernelError::NoType { name: name.to_owned() })?];
        self.read(gva, &mut bytes)?;
        Ok(Object { kernel: self, id, gva, bytes })
    }
}

impl Object<'_> {
    /// Where it was copied from.
    pub fn gva(&self) -> u64 {
        self.gva
    }

    /// The guest-virtual address of a member.
    ///
    /// # Errors
    /// [`KernelError::Member`].
    pub fn gva_of(&self, path: &str) -> Result<u64, KernelError> {
        Ok(self.gva.wrapping_add(self.member(path)?.offset))
    }

    /// Whether it has such a member: kernels differ.
    pub fn has(&self, path: &str) -> bool {
        self.member(path).is_ok()
    }

    /// The bytes of a member.
    ///
    /// # Errors
    /// [`KernelError::Member`].
    pub fn bytes(&self, path: &str) -> Result<&[u8], KernelError> {
        let Member { offset, size, .. } = self.member(path)?;
        self.slice(offset, size).ok_or_else(|| self.malformed(path))
    }

    /// A number, pointer, enumeration or bit field of at most 8 bytes, extended by zeros.
    ///
    /// # Errors
    /// [`KernelError::Member`]; [`KernelError::Malformed`] for what is larger.
    pub fn get(&self, path: &str) -> Result<u64, KernelError> {
        let number = self.number(&self.member(path)?);
        number.map(|(value, _)| value).ok_or_else(|| self.malformed(path))
    }

    /// The same of a member that [`Kernel::member`] has found in this type: quicker, for one that
    /// is read of many structures.
    ///
    /// # Errors
    /// [`KernelError::Malformed`].
    pub fn value(&self, member: &Member) -> Result<u64, KernelError> {
        self.number(member).map(|(value, _)| value).ok_or_else(|| self.malformed("of that place"))
    }

    /// The same as [`Object::get`] of a signed number.
    ///
    /// # Errors
    /// As [`Object::get`].
    pub fn get_signed(&self, path: &str) -> Result<i64, KernelError> {
        let number = self.number(&self.member(path)?);
        let (value, bits) = number.ok_or_else(|| self.malformed(path))?;
        let unused = 64 - bits.clamp(1, 64);
        Ok((value << unused).cast_signed() >> unused)
    }

    /// The bytes of an array up to the first 0, for example of `comm`.
    ///
    /// # Errors
    /// [`KernelError::Member`].
    pub fn text(&self, path: &str) -> Result<&[u8], KernelError> {
        let bytes = self.bytes(path)?;
        Ok(bytes.split(|byte| *byte == 0).next().unwrap_or_default())
    }

    /// A number, and how many bits it has.
    fn number(&self, member: &Member) -> Option<(u64, u32)> {
        let bytes = self
            .slice(member.offset, member.size)
            .filter(|bytes| (1..=9).contains(&bytes.len()))?;
        let mut word = [0; 16];
        word.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        let value = u128::from_le_bytes(word);
        let low = |value: u128| u64::try_from(value & u128::from(u64::MAX)).unwrap_or(0);
        match member.bits {
            Some(bits) => {
                Some((low(value.checked_shr(bits.shift)?) & mask(bits.count), bits.count))
            }
            None if member.size <= 8 => Some((low(value), u32::try_from(member.size * 8).ok()?)),
            None => None,
        }
    }

    fn member(&self, path: &str) -> Result<Member, KernelError> {
        let types = self.kernel.types()?;
        types.member_of(self.id, path).ok_or_else(|| {
            let name = String::from_utf8_lossy(types.name(self.id)).into_owned();
            KernelError::Member(crate::btf::MemberError::Member { name, path: path.to_owned() })
        })
    }

    fn slice(&self, offset: u64, size: u64) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        self.bytes.get(start..)?.get(..usize::try_from(size).ok()?)
    }

    fn malformed(&self, path: &str) -> KernelError {
        KernelError::Malformed { what: format!("member {path}"), gva: self.gva }
    }
}

fn mask(count: u32) -> u64 {
    if count >= 64 { u64::MAX } else { (1 << count) - 1 }
}

impl std::fmt::Debug for Object<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Object")
            .field("id", &self.id)
            .field("gva", &self.gva)
            .finish_non_exhaustive()
    }
}
