// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Any BTF: its first bytes are those of a header whose lengths fit, so that types are reached at
//! once.
#![no_main]

use kvmmem_linux::btf::Types;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((split, rest)) = bytes.split_first_chunk::<2>() else { return };
    let types = usize::from(u16::from_le_bytes(*split)).min(rest.len());
    let words =
        [24, 0, types, types, rest.len() - types].map(|word| u32::try_from(word).unwrap_or(0));
    let mut blob = vec![0x9f, 0xeb, 1, 0];
    blob.extend(words.iter().flat_map(|word| word.to_le_bytes()));
    blob.extend(rest);
    let Ok(types) = Types::parse(blob) else { return };
    for id in 0..u32::try_from(types.len()).unwrap_or(0).min(64) + 2 {
        let name = String::from_utf8_lossy(types.name(id)).into_owned();
        let _ = (
            types.size(id),
            types.find(&name),
            types.enumerator(&name),
            types.member_of(id, "a.b"),
        );
        if let Some(member) = types.member_of(id, &name) {
            assert!(member.bits.is_none_or(|bits| bits.shift < 8 && bits.count < 256));
        }
    }
});
