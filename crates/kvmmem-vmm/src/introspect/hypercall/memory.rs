// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Arguments and results of hypercalls in the introspector's virtual memory.

use kvmmem_abi::errno::KvmError;
use kvmmem_abi::ioctl::PAGE_SIZE;
use kvmmem_client::vmm::Token;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use zeroize::Zeroizing;

/// Size of a token in bytes.
const TOKEN_SIZE: usize = 32;

/// Virtual memory: how it is translated, page by page, and what it is translated to.
pub(super) struct VirtualMemory<'a, T> {
    pub(super) translate: T,
    pub(super) memory: &'a GuestMemoryMmap,
}

impl<T: Fn(u64) -> Option<u64>> VirtualMemory<'_, T> {
    /// Fills `bytes`, at most a page of them, from `gva`; they may straddle two pages that lie
    /// apart in guest-physical memory.
    ///
    /// # Errors
    /// [`KvmError::Fault`] when a part is not mapped, or not to RAM.
    pub(super) fn read(&self, gva: u64, bytes: &mut [u8]) -> Result<(), KvmError> {
        let (first, second) = bytes.split_at_mut(in_first_page(gva, bytes.len()));
        let (first_gpa, second_gpa) = self.find(gva, first.len(), second.len())?;
        self.memory.read_slice(first, first_gpa).map_err(|_| KvmError::Fault)?;
        second_gpa
            .map_or(Ok(()), |gpa| self.memory.read_slice(second, gpa))
            .map_err(|_| KvmError::Fault)
    }

    /// Writes `bytes`, at most a page of them, at `gva`. The page tables' protection does not
    /// count: only the kernel calls, and what it may write is its own affair.
    ///
    /// # Errors
    /// As [`VirtualMemory::read`].
    pub(super) fn write(&self, gva: u64, bytes: &[u8]) -> Result<(), KvmError> {
        let (first, second) = bytes.split_at(in_first_page(gva, bytes.len()));
        let (first_gpa, second_gpa) = self.find(gva, first.len(), second.len())?;
        self.memory.write_slice(first, first_gpa).map_err(|_| KvmError::Fault)?;
        second_gpa
            .map_or(Ok(()), |gpa| self.memory.write_slice(second, gpa))
            .map_err(|_| KvmError::Fault)
    }

    /// Whether `len` bytes, at most a page, can be written at `gva`.
    ///
    /// # Errors
    /// As [`VirtualMemory::read`].
    pub(super) fn check(&self, gva: u64, len: usize) -> Result<(), KvmError> {
        let first = in_first_page(gva, len);
        self.find(gva, first, len - first).map(drop)
    }

    /// The token at `gva`. The VMM's copies are zeroed when dropped.
    ///
    /// # Errors
    /// As [`VirtualMemory::read`].
    pub(super) fn token(&self, gva: u64) -> Result<Token, KvmError> {
        let mut bytes = Zeroizing::new([0u8; TOKEN_SIZE]);
        self.read(gva, bytes.as_mut_slice())?;
        Ok(Token::from_bytes(&bytes))
    }

    /// Where the bytes of the first page are, and those of the second one if there are any.
    fn find(
        &self,
        gva: u64,
        first: usize,
        second: usize,
    ) -> Result<(GuestAddress, Option<GuestAddress>), KvmError> {
        let first_gpa = self.find_part(gva, first)?;
        if second == 0 {
            return Ok((first_gpa, None));
        }
        let next_page = gva.checked_add(first as u64).ok_or(KvmError::Fault)?;
        Ok((first_gpa, Some(self.find_part(next_page, second)?)))
    }

    fn find_part(&self, gva: u64, len: usize) -> Result<GuestAddress, KvmError> {
        let gpa = GuestAddress((self.translate)(gva).ok_or(KvmError::Fault)?);
        if self.memory.check_range(gpa, len) { Ok(gpa) } else { Err(KvmError::Fault) }
    }
}

/// How many of `len` bytes at `gva` are in the first page.
fn in_first_page(gva: u64, len: usize) -> usize {
    usize::try_from(PAGE_SIZE - gva % PAGE_SIZE).map_or(len, |left| left.min(len))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn memory() -> GuestMemoryMmap {
        GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap()
    }

    fn token_bytes() -> [u8; TOKEN_SIZE] {
        std::array::from_fn(|index| u8::try_from(index * 7).unwrap())
    }

    proptest! {
        /// GVA pages 0 and 1 are GPA pages 3 and 1: apart, and in the other order.
        #[test]
        fn bytes_are_found_wherever_they_lie(gva in 0u64..0x2000 - 64) {
            let translate = |gva: u64| match gva / 0x1000 {
                0 => Some(0x3000 + gva),
                1 => Some(gva),
                _ => None,
            };
            let ram = memory();
            let memory = VirtualMemory { translate, memory: &ram };
            memory.check(gva, 64).unwrap();
            memory.write(gva, &[token_bytes(), [9; 32]].concat()).unwrap();
            for (at, byte) in (gva..).zip(token_bytes()) {
                let found: u8 = ram.read_obj(GuestAddress(translate(at).unwrap())).unwrap();
                prop_assert_eq!(found, byte);
            }
            prop_assert_eq!(memory.token(gva).unwrap().to_bytes(), token_bytes());
            let mut second = [0; 32];
            memory.read(gva + 32, &mut second).unwrap();
            prop_assert_eq!(second, [9; 32]);
        }

        #[test]
        fn any_address_and_translation_is_answered(gva in any::<u64>(), pages in any::<[Option<u64>; 2]>()) {
            let translate = |at: u64| if at == gva { pages[0] } else { pages[1] };
            let ram = memory();
            let memory = VirtualMemory { translate, memory: &ram };
            let checked = memory.check(gva, 64);
            prop_assert_eq!(memory.write(gva, &[0; 64]), checked);
            prop_assert_eq!(memory.read(gva, &mut [0; 64]), checked);
            prop_assert!(checked.is_ok() || checked == Err(KvmError::Fault));
        }
    }

    #[test]
    fn a_token_in_a_hole_or_across_the_top_faults() {
        let ram = memory();
        let memory = VirtualMemory { translate: |gva: u64| Some(gva % 0x8000), memory: &ram };
        assert!(memory.token(0).is_ok());
        assert_eq!(memory.token(0x3ff0).unwrap_err(), KvmError::Fault);
        let memory = VirtualMemory { translate: |_| None, memory: &ram };
        assert_eq!(memory.token(0x1000).unwrap_err(), KvmError::Fault);
        let memory = VirtualMemory { translate: |_| Some(0), memory: &ram };
        assert_eq!(memory.token(u64::MAX - 8).unwrap_err(), KvmError::Fault);
    }
}
