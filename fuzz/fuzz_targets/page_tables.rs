// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any page tables: 16 pages of memory are full of them, and are walked, read through and looked at
//! for their depth.
#![no_main]

use kvmmem_linux::Space;
use kvmmem_memory::paging::{AddressSpace, Levels};
use kvmmem_memory::{Memory, MemoryError, Range};
use libfuzzer_sys::fuzz_target;

const LEN: usize = 16 << 12;

struct Ram(Vec<u8>);

impl Memory for Ram {
    fn read_at(&self, gpa: u64, buf: &mut [u8]) -> Result<(), MemoryError> {
        let start = usize::try_from(gpa).unwrap_or(usize::MAX);
        let place = self.0.get(start..).and_then(|rest| rest.get(..buf.len()));
        buf.copy_from_slice(place.ok_or(MemoryError::Hole { gpa })?);
        Ok(())
    }

    fn ranges(&self) -> Result<Vec<Range>, MemoryError> {
        Ok(vec![Range { gpa: 0, len: LEN as u64 }])
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((head, rest)) = bytes.split_first_chunk::<16>() else { return };
    let word = |at: usize| head[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
    let (cr3, gva) = (word(0), word(8));
    let pattern = if rest.is_empty() { &[0][..] } else { rest };
    let ram = Ram(pattern.iter().copied().cycle().take(LEN).collect());
    for levels in [Levels::Four, Levels::Five] {
        let space = Space::new(&ram, AddressSpace { cr3, levels }, cr3 & 1 << 47);
        if let Ok(found) = space.translate(gva) {
            assert!(found.gpa < 1 << 52);
        }
        let _ = space.read(gva, &mut [0; 0x3000]);
        let _ = space.read_cstr(gva, 0x1000);
    }
    let _ = Levels::detect(cr3, |gpa, buf| ram.read_at(gpa, buf));
});
