// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Writes the tables of kallsyms, as `scripts/kallsyms.c` of several kernels does.

use super::{Guest, KALLSYMS, Place};

/// The order of the tables, and what addresses are relative to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Layout {
    /// 5.10: offsets and base before the names, and no keys in the note.
    BeforeNames,
    /// 6.12: offsets and base after the index.
    AfterIndex,
    /// 6.15: the same, with offsets that are not signed.
    Unsigned,
    /// 7.3: offsets relative to their own place.
    FromPlace,
}

/// Values of the tokens that are not letters of names.
const TOKENS: [(u8, &str); 3] = [(0, "tfiller_"), (1, "init_"), (0x80, "swapper_pg_dir")];

pub(crate) type Entry = (char, String, u64);

/// Writes the tables and gives the note's lines about them.
pub(crate) fn write(guest: &Guest, place: &Place, symbols: &[Entry]) -> String {
    let Place { gpa, gva, layout, .. } = *place;
    let count = u32::try_from(symbols.len()).unwrap();
    let (mut names, mut markers) = (Vec::new(), Vec::new());
    for (n, (kind, name, _)) in symbols.iter().enumerate() {
        if n % 256 == 0 {
            markers.extend(u32::try_from(names.len()).unwrap().to_le_bytes());
        }
        names.extend(compress(&format!("{kind}{name}")));
    }
    let (table, index) = tokens();
    let mut at = KALLSYMS;
    let mut put = |bytes: &[u8], align: u64| {
        at = at.next_multiple_of(align);
        guest.put(gpa + at, bytes);
        at += bytes.len() as u64;
        gva + at - bytes.len() as u64
    };
    let base = gva;
    let offsets = |place: u64| -> Vec<u8> {
        let offset = |(n, (_, _, address)): (usize, &Entry)| {
            let offset = match layout {
                Layout::BeforeNames | Layout::AfterIndex if *address < 1 << 31 => *address,
                Layout::BeforeNames | Layout::AfterIndex => {
                    base.wrapping_sub(1).wrapping_sub(*address)
                }
                // Addresses outside the image lie somewhere else.
                Layout::Unsigned => address.wrapping_sub(base),
                Layout::FromPlace => address.wrapping_sub(place + 4 * n as u64),
            };
            u32::try_from(offset & 0xffff_ffff).unwrap().to_le_bytes()
        };
        symbols.iter().enumerate().flat_map(offset).collect()
    };
    // What lies before the tables in a kernel.
    put(b"some text\0", 8);
    let mut places = None;
    if layout == Layout::BeforeNames {
        let start = put(&[], 8);
        places = Some((put(&offsets(start), 8), put(&base.to_le_bytes(), 8)));
    }
    let number = put(&count.to_le_bytes(), 8);
    let names = put(&names, if layout == Layout::FromPlace { 4 } else { 8 });
    put(&markers, if layout == Layout::FromPlace { 4 } else { 8 });
    if layout == Layout::AfterIndex {
        // Sequence numbers, three bytes each.
        put(&(0..3 * count).map(|n| n.to_le_bytes()[0] | 1).collect::<Vec<u8>>(), 8);
        put(&[0; 8], 8);
    }
    let table = put(&table, 8);
    let index = put(&index, 8);
    let (offsets, base) = places.unwrap_or_else(|| {
        let start = put(&[], 8);
        (put(&offsets(start), 8), put(&base.to_le_bytes(), 8))
    });
    let keys = [
        ("names", names),
        ("num_syms", number),
        ("token_table", table),
        ("token_index", index),
        ("offsets", offsets),
        ("relative_base", base),
    ];
    let keys = keys.iter().filter(|(key, _)| match layout {
        Layout::BeforeNames => false,
        Layout::FromPlace => *key != "relative_base",
        _ => true,
    });
    keys.map(|(key, gva)| format!("SYMBOL(kallsyms_{key})={gva:x}\n")).collect()
}

fn compress(name: &str) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut rest = name;
    while let Some(first) = rest.chars().next() {
        let token = TOKENS.iter().find(|(_, text)| rest.starts_with(text));
        bytes.push(token.map_or(first as u8, |(token, _)| *token));
        rest = &rest[token.map_or(1, |(_, text)| text.len())..];
    }
    let mut name = vec![u8::try_from(bytes.len()).unwrap()];
    name.extend(bytes);
    name
}

/// The tokens and where each begins.
fn tokens() -> (Vec<u8>, Vec<u8>) {
    let (mut table, mut index) = (Vec::new(), Vec::new());
    for token in 0..=255u8 {
        index.extend(u16::try_from(table.len()).unwrap().to_le_bytes());
        let other = TOKENS.iter().find(|(number, _)| *number == token);
        match other {
            Some((_, text)) => table.extend(text.bytes()),
            None if token.is_ascii_alphanumeric() || b"_.$".contains(&token) => table.push(token),
            None => {}
        }
        table.push(0);
    }
    (table, index)
}
