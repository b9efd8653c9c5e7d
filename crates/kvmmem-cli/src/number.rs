// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Numbers, UUIDs and bytes on the command line.

use std::fmt::Display;
use std::num::IntErrorKind;
use std::ops::RangeInclusive;
use std::str::FromStr;

use serde::{Serialize, Serializer};
use uuid::Uuid;

/// How numbers are written, for messages and help.
const FORM: &str = "write it as 4096, 0x1000, 4K or 4KiB (K, M, G, T: powers of 1024)";

/// Units of sizes and addresses: the letter, and the power of two.
const UNITS: [(char, u32); 4] = [('k', 10), ('m', 20), ('g', 30), ('t', 40)];

/// An address, a length or a size: decimal, or hexadecimal after `0x`, with an optional unit (`K`
/// or `KiB`, up to `T`).
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let lower = text.to_ascii_lowercase();
    let ends_with_unit = |text: &&str| text.ends_with(UNITS.map(|(letter, _)| letter));
    let body = lower.strip_suffix("ib").filter(ends_with_unit).unwrap_or(&lower);
    let with_unit =
        UNITS.into_iter().find_map(|(letter, shift)| Some((body.strip_suffix(letter)?, shift)));
    let (number, shift) = with_unit.unwrap_or((body, 0));
    let (digits, radix) = number.strip_prefix("0x").map_or((number, 10), |digits| (digits, 16));
    // `from_str_radix` would take a sign.
    if digits.starts_with(['+', '-']) {
        return Err(format!("a number cannot have a sign; {FORM}"));
    }
    let too_large = || format!("the number is too large; it is at most {:#x}", u64::MAX);
    match u64::from_str_radix(digits, radix) {
        Ok(number) => number.checked_mul(1 << shift).ok_or_else(too_large),
        Err(error) if *error.kind() == IntErrorKind::PosOverflow => Err(too_large()),
        Err(_) if radix == 10 && is_hex(digits) => {
            Err(format!("hexadecimal numbers begin with 0x: write 0x{text}"))
        }
        Err(_) => Err(FORM.into()),
    }
}

/// A length: as [`parse`], and at least one byte.
pub(crate) fn parse_length(text: &str) -> Result<u64, String> {
    match parse(text)? {
        0 => Err("the length is 0; give at least 1 byte".into()),
        length => Ok(length),
    }
}

fn is_hex(digits: &str) -> bool {
    !digits.is_empty() && digits.bytes().all(|digit| digit.is_ascii_hexdigit())
}

/// Parser of a decimal number within `range`.
pub(crate) fn integer<T>(
    range: RangeInclusive<T>,
) -> impl Fn(&str) -> Result<T, String> + Clone + Send + Sync + 'static
where
    T: FromStr + PartialOrd + Display + Clone + Send + Sync + 'static,
{
    move |text| {
        let number = text.parse().ok().filter(|number| range.contains(number));
        let (first, last) = (range.start(), range.end());
        number.ok_or_else(|| format!("give a whole number from {first} to {last}"))
    }
}

/// Reads a virtual machine's UUID.
pub(crate) fn parse_uuid(text: &str) -> Result<Uuid, String> {
    match Uuid::parse_str(text) {
        Ok(uuid) if uuid.is_nil() => Err("this UUID names no virtual machine".into()),
        Ok(uuid) => Ok(uuid),
        Err(_) => Err("write a UUID as 00112233-4455-6677-8899-aabbccddeeff".into()),
    }
}

/// A size in the largest unit that divides it.
pub(crate) fn size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    let unit = units.into_iter().find(|(shift, _)| bytes > 0 && bytes.is_multiple_of(1 << shift));
    unit.map_or_else(|| count(bytes, "byte"), |(shift, unit)| format!("{} {unit}", bytes >> shift))
}

/// A number of things; `one` is the singular: `1 byte`, `2 bytes`.
pub(crate) fn count(number: impl TryInto<u64> + Display, one: &str) -> String {
    let text = format!("{number} {one}");
    if number.try_into().is_ok_and(|number| number == 1) { text } else { text + "s" }
}

/// The size of a VM's memory in MiB: whole, or with a decimal where it is not. RAM that lacks what
/// the VGA window covers must not look like RAM that was rounded.
pub(crate) fn mebibytes(bytes: u64) -> String {
    let (whole, rest) = (bytes >> 20, bytes % (1 << 20));
    // Rounded down, so that what is not whole never looks as if it were.
    let tenths = (rest * 10) >> 20;
    if rest == 0 { format!("{whole} MiB") } else { format!("{whole}.{tenths} MiB") }
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
    bytes.map(HexBytes).ok_or_else(|| "a character is not a hexadecimal digit".into())
}

/// Bytes as lower-case hexadecimal digits.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A 64-bit value that JSON shows as a string, `"0xffff888000001000"`: programs that read JSON's
/// numbers as doubles would round it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Hex(pub(crate) u64);

impl Serialize for Hex {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&format_args!("{:#x}", self.0))
    }
}

/// Where something lies, as JSON: `"gpa": ...` or `"gva": ...` of an object that it is flattened
/// into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Address {
    Gpa(Hex),
    Gva(Hex),
}

impl Address {
    /// The address itself.
    pub(crate) fn get(self) -> u64 {
        match self {
            Self::Gpa(Hex(address)) | Self::Gva(Hex(address)) => address,
        }
    }

    /// The address that many bytes later.
    pub(crate) fn plus(self, bytes: u64) -> Self {
        match self {
            Self::Gpa(Hex(at)) => Self::Gpa(Hex(at.wrapping_add(bytes))),
            Self::Gva(Hex(at)) => Self::Gva(Hex(at.wrapping_add(bytes))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_decimal_or_hexadecimal() {
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("0x1000"), Ok(4096));
        assert_eq!(parse("0XfFfFfFfFfFfFfFfF"), Ok(u64::MAX));
        for text in
            ["", "0x", "-1", "+1", "0x-1", "0x+1", "1000h", "ff", "0x10000000000000000", "1 "]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn numbers_have_units() {
        assert_eq!(parse("512M"), Ok(512 << 20));
        assert_eq!(parse("0x10k"), Ok(16 << 10));
        for (unit, shift) in [("K", 10), ("m", 20), ("GiB", 30), ("TIB", 40)] {
            assert_eq!(parse(&format!("3{unit}")), Ok(3 << shift), "{unit}");
        }
        // The last letter is a digit.
        assert_eq!(parse("0x1B"), Ok(27));
        for text in ["M", "iB", "1iB", "1MB", "1 M", "-1M", "16777216T", "1.5G", "1Ä"] {
            assert!(parse(text).is_err(), "{text}");
        }
        assert!(parse_length("0").is_err() && parse_length("0K").is_err());
        assert_eq!(parse_length("1K"), Ok(1024));
    }

    #[test]
    fn a_hexadecimal_number_without_0x_is_recognised() {
        let error = parse("ffffffff81000000").unwrap_err();
        assert!(error.ends_with("write 0xffffffff81000000"), "{error}");
        let error = parse("zebra").unwrap_err();
        assert!(error.contains("0x1000"), "{error}");
    }

    #[test]
    fn json_shows_64_bit_values_as_strings() {
        assert_eq!(serde_json::to_string(&Hex(u64::MAX)).unwrap(), "\"0xffffffffffffffff\"");
    }

    #[test]
    fn sizes_are_short() {
        let cases = [
            (0, "0 bytes"),
            (1, "1 byte"),
            (4095, "4095 bytes"),
            (4096, "4 KiB"),
            (3 << 20, "3 MiB"),
            (1536 << 20, "1536 MiB"),
            (1 << 40, "1 TiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(size(bytes), text);
        }
        // Of 512 MiB, what the VGA window does not cover; all but a byte.
        let cases = [
            (512 << 20, "512 MiB"),
            ((512 << 20) - (128 << 10), "511.8 MiB"),
            ((512 << 20) - 1, "511.9 MiB"),
            (4096, "0.0 MiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(mebibytes(bytes), text);
        }
    }

    #[test]
    fn whole_numbers_and_uuids_are_checked() {
        let threads = integer(1..=1024u16);
        assert_eq!(threads("1024"), Ok(1024));
        for text in ["", "0", "1025", "99999", "-1", "x"] {
            let error = threads(text).unwrap_err();
            assert_eq!(error, "give a whole number from 1 to 1024", "{text}");
        }
        assert!(parse_uuid("00112233-4455-6677-8899-aabbccddeeff").is_ok());
        assert!(parse_uuid("abc").unwrap_err().starts_with("write a UUID as"));
        assert!(parse_uuid("00000000-0000-0000-0000-000000000000").is_err());
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
