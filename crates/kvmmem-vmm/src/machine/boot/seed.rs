// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A seed for the guest's random numbers (`SETUP_RNG_SEED` of Documentation/arch/x86/boot.rst):
//! without it a guest that finds no other source waits long for its first random bytes. The guest
//! wipes it when it has read it.

use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Address, Bytes, GuestMemoryError, GuestMemoryMmap};
use zeroize::Zeroizing;

use super::layout::SEED;

const SETUP_RNG_SEED: u32 = 9;
const SEED_LEN: usize = 32;

/// Writes the seed and returns its GPA, for the boot parameters' `setup_data`; 0 where the host has
/// no random bytes.
///
/// # Errors
/// When RAM ends before.
pub(crate) fn write_seed(memory: &GuestMemoryMmap) -> Result<u64, GuestMemoryError> {
    let mut seed = Zeroizing::new([0u8; SEED_LEN]);
    if getrandom(seed.as_mut_slice(), GetRandomFlags::NONBLOCK) != Ok(SEED_LEN) {
        return Ok(0);
    }
    // struct setup_data: next (none), type, len, data.
    memory.write_obj(0u64, SEED)?;
    memory.write_obj([SETUP_RNG_SEED, 32], SEED.unchecked_add(8))?;
    memory.write_slice(seed.as_slice(), SEED.unchecked_add(16))?;
    Ok(SEED.0)
}

#[cfg(test)]
mod tests {
    use vm_memory::GuestAddress;

    use super::*;

    #[test]
    fn two_machines_get_different_seeds() {
        let seed = || {
            let memory =
                GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x20_0000)]).unwrap();
            let at = GuestAddress(write_seed(&memory).unwrap());
            let header: [u32; 4] = memory.read_obj(at).unwrap();
            assert_eq!(header, [0, 0, 9, 32]);
            memory.read_obj::<[u8; SEED_LEN]>(at.unchecked_add(16)).unwrap()
        };
        assert_ne!(seed(), seed());
    }
}
