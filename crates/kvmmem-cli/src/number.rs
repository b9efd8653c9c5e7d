// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers and bytes on the command line.

/// An address or a count: decimal, or hexadecimal after `0x`.
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let digits = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let (digits, radix) = digits.map_or((text, 10), |digits| (digits, 16));
    // `from_str_radix` would take a sign.
    if digits.starts_with(['+', '-']) {
        return Err("a number cannot have a sign".into());
    }
    u64::from_str_radix(digits, radix)
        .map_err(|error| format!("{error}; write it as 4096 or 0x1000, at most 0x{:x}", u64::MAX))
}

/// A size in bytes: a number, with K, M, G or T behind it for powers of 1024.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let shifts = [('K', 10), ('M', 20), ('G', 30), ('T', 40)];
    let suffix = text.chars().last().map(|last| last.to_ascii_uppercase());
    let shift = shifts.into_iter().find(|(letter, _)| suffix == Some(*letter)).map(|(_, shift)| shift);
    let Some(shift) = shift else { return parse(text) };
    let number = parse(text.get(..text.len() - 1).unwrap_or_default())?;
    number.checked_mul(1 << shift).ok_or_else(|| "the size is too large".into())
}

/// Bytes as pairs of hexadecimal digits, with or without `0x` before them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HexBytes(pub(crate) Vec<u8>);

/// Reads [`HexBytes`].
pub(crate) fn parse_hex(text: &str) -> Result<HexBytes, String> {
    let digits = text.strip_prefix("0x").unwrap_or(text).as_bytes();
    let (pairs, rest) = digits.as_chunks::<2>();
    if pairs.is_empty() || !rest.is_empty() {
        return Err("write bytes as pairs of hexadecimal digits, for example 00ff12".into());
    }
    let digit = |character: u8| char::from(character).to_digit(16);
    let byte = |[high, low]: &[u8; 2]| u8::try_from(digit(*high)? << 4 | digit(*low)?).ok();
    let bytes: Option<Vec<u8>> = pairs.iter().map(byte).collect();
    bytes.map(HexBytes).ok_or_else(|| "a character is no hexadecimal digit".into())
}

/// Bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("0x1000"), Ok(4096));
        assert_eq!(parse("0XfFfFfFfFfFfFfFfF"), Ok(u64::MAX));
        for text in ["", "0x", "-1", "+1", "0x-1", "0x+1", "1000h", "ff", "0x10000000000000000", "1 "] {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_have_suffixes() {
        assert_eq!(parse_size("512M"), Ok(512 << 20));
        assert_eq!(parse_size("0x10k"), Ok(16 << 10));
        assert_eq!(parse_size("4096"), Ok(4096));
        for text in ["", "M", "-1M", "16777216T", "1.5G", "1Ä"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn bytes_are_pairs_of_digits() {
        assert_eq!(parse_hex("00ffA1"), Ok(HexBytes(vec![0, 0xff, 0xa1])));
        assert_eq!(parse_hex("0x01"), Ok(HexBytes(vec![1])));
        assert_eq!(hex(&[0, 0xff, 0xa1]), "00ffa1");
        for text in ["", "0", "0x", "abc", "zz", "+1", "ä"] {
            assert!(parse_hex(text).is_err(), "{text}");
        }
    }
}
