// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The descriptor page: what is written is read, and nothing else is believed.

use kvmmem_abi::descriptor::{
    Descriptor, DescriptorError, FLAG_TOKENS, GENERATION_AT, MAX_RANGES, SIZE, WindowRange,
};
use kvmmem_abi::native::{RIGHT_READ, STATE_OPEN};
use proptest::prelude::*;

fn descriptor() -> Descriptor {
    Descriptor {
        generation: 8,
        state: STATE_OPEN,
        rights: RIGHT_READ,
        token_digest: std::array::from_fn(|n| u8::try_from(n).unwrap()),
        uuid: [7; 16],
        window_gpa: 0x40_0000_0000,
        window_len: 0x10_0000,
        range_count: 2,
        flags: FLAG_TOKENS,
        instance: 0x1234_5678_9abc_def0,
    }
}

const RANGES: [WindowRange; 2] = [
    WindowRange { gpa: 0x1000, len: 0x2000, offset: 0x1000, window: 0 },
    WindowRange { gpa: 0x10_0000, len: 0x1000, offset: 0x8000, window: 0 },
];

fn page() -> [u8; SIZE] {
    let mut page = [0xff; SIZE];
    descriptor().write(&RANGES, &mut page);
    page
}

fn read(page: &[u8; SIZE]) -> Result<(Descriptor, [WindowRange; MAX_RANGES]), DescriptorError> {
    let mut ranges = [WindowRange::default(); MAX_RANGES];
    Descriptor::read(page, &mut ranges, |_| None).map(|read| (read, ranges))
}

#[test]
fn what_is_written_is_read() {
    let (read, ranges) = read(&page()).unwrap();
    assert_eq!((read, &ranges[..2]), (descriptor(), &RANGES[..]));
}

#[test]
fn lies_are_refused() {
    let change = |at: usize, bytes: &[u8]| {
        let mut page = page();
        page[at..at + bytes.len()].copy_from_slice(bytes);
        read(&page).unwrap_err()
    };
    assert_eq!(change(0, b"x"), DescriptorError::Magic);
    assert_eq!(change(8, &[2]), DescriptorError::Version);
    assert_eq!(change(GENERATION_AT, &[9]), DescriptorError::Changing);
    for (at, byte) in [
        (24, 0),
        (24, 4),
        (28, 0),
        (28, 2),
        (28, 5),
        (80, 1),
        (87, 0xff),
        (88, 1),
        (95, 0xff),
        (96, 65),
    ] {
        assert_eq!(change(at, &[byte]), DescriptorError::Header, "{at}");
    }
    // Each field of the second range: unaligned, empty, before the first one's end, out of the
    // window, no window.
    let second = 128 + 32;
    assert_eq!(change(second, &[1]), DescriptorError::Range);
    assert_eq!(change(second, &0x2000u64.to_le_bytes()), DescriptorError::Range);
    assert_eq!(change(second, &(!0xfffu64).to_le_bytes()), DescriptorError::Range);
    assert_eq!(change(second + 8, &0u64.to_le_bytes()), DescriptorError::Range);
    assert_eq!(change(second + 8, &(!0xfffu64).to_le_bytes()), DescriptorError::Range);
    assert_eq!(change(second + 16, &0x10_0000u64.to_le_bytes()), DescriptorError::Range);
    assert_eq!(change(second + 24, &[1]), DescriptorError::Range);
}

proptest! {
    #[test]
    fn any_page_is_read_or_refused(noise in proptest::collection::vec((0..SIZE, any::<u8>()), 0..40)) {
        let mut page = page();
        for (at, byte) in noise {
            page[at] = byte;
        }
        if let Ok((read, ranges)) = read(&page) {
            let mut end = 0;
            for range in &ranges[..read.range_count] {
                prop_assert!(range.gpa >= end && range.len > 0);
                prop_assert!(range.offset + range.len <= read.window_len);
                end = range.gpa + range.len;
            }
        }
    }
}
