// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Fetches a token from the introspector's virtual memory.

use kvmmem_abi::errno::KvmError;
use kvmmem_abi::ioctl::PAGE_SIZE;
use kvmmem_broker::link::Token;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use zeroize::Zeroizing;

/// Size of a token in bytes.
const SIZE: usize = 32;

/// Reads the token at guest-virtual address `gva`, which may straddle two pages that lie apart in guest-physical
/// memory. The VMM's copies are zeroed when dropped.
///
/// # Errors
/// [`KvmError::Fault`] when a part of it is not mapped, or not to RAM.
pub(super) fn read(
    gva: u64,
    translate: impl Fn(u64) -> Option<u64>,
    memory: &GuestMemoryMmap,
) -> Result<Token, KvmError> {
    let mut bytes = Zeroizing::new([0u8; SIZE]);
    let in_first_page = usize::try_from(PAGE_SIZE - gva % PAGE_SIZE).map_or(SIZE, |left| left.min(SIZE));
    let (first, second) = bytes.split_at_mut(in_first_page);
    read_part(gva, first, &translate, memory)?;
    if !second.is_empty() {
        let next_page = gva.checked_add(first.len() as u64).ok_or(KvmError::Fault)?;
        read_part(next_page, second, &translate, memory)?;
    }
    Ok(Token::from_bytes(&bytes))
}

fn read_part(
    gva: u64,
    part: &mut [u8],
    translate: impl Fn(u64) -> Option<u64>,
    memory: &GuestMemoryMmap,
) -> Result<(), KvmError> {
    let gpa = translate(gva).ok_or(KvmError::Fault)?;
    memory.read_slice(part, GuestAddress(gpa)).map_err(|_| KvmError::Fault)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn token_bytes() -> [u8; SIZE] {
        std::array::from_fn(|index| u8::try_from(index * 7).unwrap())
    }

    proptest! {
        /// GVA pages 0 and 1 are GPA pages 3 and 1: apart, and in the other order.
        #[test]
        fn a_token_is_found_wherever_it_lies(gva in 0u64..0x2000 - 32) {
            let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
            let translate = |gva: u64| match gva / 0x1000 {
                0 => Some(0x3000 + gva),
                1 => Some(gva),
                _ => None,
            };
            for (at, byte) in (gva..).zip(token_bytes()) {
                memory.write_obj(byte, GuestAddress(translate(at).unwrap())).unwrap();
            }
            prop_assert_eq!(read(gva, translate, &memory).unwrap().to_bytes(), token_bytes());
        }

        #[test]
        fn any_address_and_translation_is_answered(gva in any::<u64>(), pages in any::<[Option<u64>; 2]>()) {
            let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
            let translate = |at: u64| if at == gva { pages[0] } else { pages[1] };
            if let Err(error) = read(gva, translate, &memory) {
                prop_assert_eq!(error, KvmError::Fault);
            }
        }
    }

    #[test]
    fn a_token_in_a_hole_or_across_the_top_faults() {
        let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x4000)]).unwrap();
        let identity = |gva: u64| Some(gva % 0x8000);
        assert!(read(0, identity, &memory).is_ok());
        assert_eq!(read(0x3ff0, identity, &memory).unwrap_err(), KvmError::Fault);
        assert_eq!(read(0x1000, |_| None, &memory).unwrap_err(), KvmError::Fault);
        assert_eq!(read(u64::MAX - 8, |_| Some(0), &memory).unwrap_err(), KvmError::Fault);
    }
}
