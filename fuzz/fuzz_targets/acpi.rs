// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any ACPI tables in a guest's memory. The first byte says how much there is, the others are
//! pieces of it: where each lies, how long it is, whether its checksums are to be right, and what
//! is in it.
#![no_main]

use kvmmem_qemu::acpi;

use libfuzzer_sys::fuzz_target;

/// RAM, bytes: little, which is quickly searched, or so much that the BIOS's part is there.
const SIZES: [usize; 2] = [0x1_0000, 0x11_0000];

const SIGNATURES: [&[u8]; 5] = [b"RSD PTR ", b"RSDT", b"XSDT", b"FACP", b"DSDT"];

fuzz_target!(|bytes: &[u8]| {
    let Some((size, mut rest)) = bytes.split_first() else { return };
    let mut ram = vec![0; SIZES[usize::from(*size == 0xff)]];
    while let Some(([kind, at @ .., len], tail)) = rest.split_first_chunk::<5>() {
        let (piece, tail) = tail.split_at(tail.len().min(usize::from(*len)));
        rest = tail;
        let at = (u32::from_le_bytes([at[0], at[1], at[2], 0]) as usize) << 4;
        let Some(place) = ram.get_mut(at..at + piece.len()) else { continue };
        place.copy_from_slice(piece);
        let signature = SIGNATURES[usize::from(kind & 7) % SIGNATURES.len()];
        if let Some(start) = place.get_mut(..signature.len()) {
            start.copy_from_slice(signature);
        }
        if kind & 8 == 0 {
            seal(place, signature.len() == 8);
        }
    }
    let read = |gpa: u64, to: &mut [u8]| {
        let start = usize::try_from(gpa).ok()?;
        to.copy_from_slice(ram.get(start..start.checked_add(to.len())?)?);
        Some(())
    };
    let low_end = ram.len() as u64;
    if let Ok(end) = acpi::verify(read, low_end) {
        assert!(end <= low_end);
    }
});

/// Makes the checksums right: of the structure that all begins with, or of a table that is as long
/// as its piece.
fn seal(place: &mut [u8], is_pointer: bool) {
    if is_pointer {
        sum(place.get_mut(..20), 8);
        sum(place.get_mut(..36), 32);
    } else if let Ok(len) = u32::try_from(place.len())
        && let Some(field) = place.get_mut(4..8)
    {
        field.copy_from_slice(&len.to_le_bytes());
        sum(Some(place), 9);
    }
}

fn sum(bytes: Option<&mut [u8]>, at: usize) {
    if let Some(bytes) = bytes
        && at < bytes.len()
    {
        bytes[at] = 0;
        bytes[at] = bytes.iter().fold(0, |sum: u8, byte| sum.wrapping_sub(*byte));
    }
}
