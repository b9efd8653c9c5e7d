// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Names of VMs: 1 to 63 bytes, which KVMI's handshake carries, that a terminal only shows.
//!
//! A name that a VMM's command line or a QEMU gives may be any text. [`fit`] makes a name of it,
//! always the same one: this is the only place where names are cut.

/// The longest name, bytes.
pub const MAX_NAME: usize = kvmmem_kvmi::handshake::MAX_NAME;

/// How a command line names a VM by something else than its name; no name begins like that.
const SCHEMES: [&str; 3] = ["pid:", "qmp:", "libvirt:"];

/// Whether a terminal does something else with a character than to show it: control characters,
/// those that change the direction of text or join lines, and those that it does not show at all.
pub fn is_unprintable(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{fff9}'..='\u{fffb}' | '\u{e0000}'..='\u{e0fff}')
}

/// Whether a text is a name as it is.
pub fn is_name(text: &str) -> bool {
    (1..=MAX_NAME).contains(&text.len()) && !text.chars().any(is_unprintable) && !has_scheme(text)
}

fn has_scheme(text: &str) -> bool {
    SCHEMES.iter().any(|scheme| text.starts_with(scheme))
}

/// The name of a VM that is called so; `None` where the text is empty. A character that is not to
/// be shown becomes `?`, and so does the colon of `pid:`, `qmp:` or `libvirt:`. A text that is too
/// long is cut, between characters, and ends in `~` and eight hexadecimal digits, which are those
/// of all of the text (FNV-1a): texts that differ only where they are cut have different names.
pub fn fit(text: &str) -> Option<String> {
    let mut plain: String = text.chars().map(|c| if is_unprintable(c) { '?' } else { c }).collect();
    if has_scheme(&plain) {
        plain = plain.replacen(':', "?", 1);
    }
    if plain.len() <= MAX_NAME {
        return Some(plain).filter(|plain| !plain.is_empty());
    }
    let digits = format!("~{:08x}", hash(text));
    let end = plain.floor_char_boundary(MAX_NAME - digits.len());
    Some(plain.get(..end).unwrap_or_default().to_owned() + &digits)
}

/// FNV-1a, folded to 32 bits.
fn hash(text: &str) -> u64 {
    const START: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    let hash = text.bytes().fold(START, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(PRIME));
    (hash >> 32) ^ (hash & 0xffff_ffff)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_a_name_stays_as_it_is() {
        for text in ["web-1", "a b", "é", &"x".repeat(63), &"虚".repeat(21)] {
            assert_eq!(fit(text).as_deref(), Some(text));
        }
        assert_eq!(fit(""), None);
        assert_eq!(fit("a\u{1b}[2J\u{202e}b\u{85}").as_deref(), Some("a?[2J?b?"));
    }

    #[test]
    fn names_that_agree_in_the_first_63_bytes_are_two() {
        let start = "instance-".repeat(7);
        let (one, other) =
            (fit(&format!("{start}-one")).unwrap(), fit(&format!("{start}-other")).unwrap());
        assert_ne!(one, other);
        assert_eq!((one.len(), &one[..54], &one[54..55]), (63, &start[..54], "~"));
        assert_eq!(fit(&format!("{start}-one")), Some(one), "it is not the same each time");
        // Thirty characters of three bytes.
        let long = fit(&"虚拟".repeat(15)).unwrap();
        assert!(
            is_name(&long) && long.starts_with(&"虚拟".repeat(9)) && long.len() == 63,
            "{long}"
        );
    }

    #[test]
    fn no_name_reads_as_another_way_to_name_a_vm() {
        for text in ["pid:1", "pid:", "qmp:/run/x", "libvirt:web"] {
            assert!(!is_name(text), "{text}");
            assert_eq!(fit(text), Some(text.replacen(':', "?", 1)));
        }
        for text in ["pid", "vm-pid:1", "PID:1"] {
            assert_eq!(fit(text).as_deref(), Some(text));
        }
    }

    proptest! {
        #[test]
        fn any_text_makes_a_name(text in "\\PC{0,80}|.{0,80}|\u{202e}{1,40}|(pid|qmp|libvirt):.{0,80}") {
            match fit(&text) {
                Some(name) => {
                    prop_assert!(is_name(&name));
                    prop_assert_eq!(fit(&name), Some(name));
                }
                None => prop_assert!(text.is_empty()),
            }
        }
    }
}
