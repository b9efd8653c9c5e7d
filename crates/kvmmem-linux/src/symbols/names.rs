// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The names of kallsyms: compressed by tokens, each a byte that stands for a text
//! (`scripts/kallsyms.c`, `kallsyms_expand_symbol` in `kernel/kallsyms.c`).

use super::error::TableError;

/// Tokens that there can be.
const TOKENS: usize = 256;

/// The longest name with its type letter and its end (KSYM_NAME_LEN).
pub(super) const MAX_NAME: usize = 512;

/// The most bytes of all tokens.
pub(super) const MAX_TOKEN_BYTES: usize = 1 << 16;

/// The most names that a kernel may have. Debian's has 200,000.
pub(super) const MAX_NAMES: u32 = 1 << 21;

/// The most bytes of compressed names.
const MAX_BYTES: usize = 64 << 20;

/// What each byte of a compressed name stands for.
#[derive(Clone, Debug)]
pub(super) struct Tokens {
    table: Vec<u8>,
    /// Start and length of each token.
    places: Vec<(u32, u32)>,
}

impl Tokens {
    /// Of the bytes at kallsyms_token_table and the numbers at kallsyms_token_index.
    pub(super) fn new(table: Vec<u8>, index: &[u16]) -> Option<Self> {
        let place = |start: &u16| {
            let token = table.get(usize::from(*start)..)?;
            let len = memchr::memchr(0, token)?;
            Some((u32::from(*start), u32::try_from(len).ok()?))
        };
        let places: Vec<(u32, u32)> = index.iter().map(place).collect::<Option<_>>()?;
        (places.len() == TOKENS).then_some(Self { table, places })
    }

    fn get(&self, token: u8) -> &[u8] {
        let (start, len) = self.places.get(usize::from(token)).copied().unwrap_or_default();
        self.table.get(start as usize..(start + len) as usize).unwrap_or_default()
    }
}

/// All names, compressed, in the kernel's order.
#[derive(Debug)]
pub(super) struct Names {
    bytes: Vec<u8>,
    /// Where each name's tokens begin and end in `bytes`.
    places: Vec<(u32, u16)>,
    tokens: Tokens,
}

impl Names {
    /// Reads `count` names with `more`, which returns the next bytes, and an empty slice at their
    /// end.
    pub(super) fn read(
        count: u32,
        tokens: Tokens,
        mut more: impl FnMut(usize) -> Option<Vec<u8>>,
    ) -> Result<Self, TableError> {
        if count == 0 || count > MAX_NAMES {
            return Err(TableError::Count { count });
        }
        let mut names = Self { bytes: Vec::new(), places: Vec::new(), tokens };
        let mut at = 0;
        while names.places.len() < count as usize {
            match next_name(&names.bytes, at) {
                Some((start, len)) => {
                    let place = (u32::try_from(start).unwrap_or(u32::MAX), len);
                    names.places.push(place);
                    at = start + usize::from(len);
                }
                None => {
                    let bytes = more(names.bytes.len()).unwrap_or_default();
                    if bytes.is_empty() || names.bytes.len() + bytes.len() > MAX_BYTES {
                        return Err(TableError::Short { count, found: names.places.len() });
                    }
                    names.bytes.extend(bytes);
                }
            }
        }
        Ok(names)
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Writes the name with this number to `name`, and gives its type letter; `None` where it is
    /// too long or empty.
    pub(super) fn expand(&self, index: usize, name: &mut Vec<u8>) -> Option<u8> {
        name.clear();
        let (start, len) = *self.places.get(index)?;
        let tokens = self.bytes.get(start as usize..)?.get(..usize::from(len))?;
        let mut kind = None;
        for token in tokens {
            let mut text = self.tokens.get(*token);
            if kind.is_none()
                && let Some((first, rest)) = text.split_first()
            {
                (kind, text) = (Some(*first), rest);
            }
            if name.len() + text.len() >= MAX_NAME {
                return None;
            }
            name.extend(text);
        }
        kind.filter(|_| !name.is_empty())
    }
}

/// Start and length of the tokens of the name whose length is at `at`, if all of it is there.
pub(super) fn next_name(bytes: &[u8], at: usize) -> Option<(usize, u16)> {
    let (first, mut start) = (u16::from(*bytes.get(at)?), at + 1);
    let mut len = first;
    if first & 0x80 != 0 {
        len = first & 0x7f | u16::from(*bytes.get(start)?) << 7;
        start += 1;
    }
    (bytes.len() - start >= usize::from(len)).then_some((start, len))
}
