// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Text without what drives a terminal. Guests, VMMs and other peers name much of what is printed.

use std::fmt::Write as _;
use std::io;

use kvmmem_proto::name::is_unprintable;
use serde::Serialize;

/// The text without what a terminal would not just show: some of it comes from peers, and must not
/// drive the terminal.
pub(crate) fn escape(text: &str) -> String {
    if text.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
        return text.to_owned();
    }
    text.chars()
        .flat_map(|c| {
            let (plain, escaped) =
                if is_unprintable(c) { (None, Some(c.escape_default())) } else { (Some(c), None) };
            plain.into_iter().chain(escaped.into_iter().flatten())
        })
        .collect()
}

/// The object as a line of JSON in which every character that a terminal does not just show is an
/// escape.
pub(crate) fn json(object: &impl Serialize) -> io::Result<String> {
    Ok(escape_json(&serde_json::to_string(object)?))
}

/// JSON with escapes for what serde_json writes as it is and a terminal does not just show: U+007F
/// to U+009F, marks that change the direction of text, and the like. They stand in strings alone.
pub(crate) fn escape_json(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        if c == '\n' || !is_unprintable(c) {
            escaped.push(c);
            continue;
        }
        for unit in c.encode_utf16(&mut [0; 2]) {
            // A string takes all that is written to it.
            let _ = write!(escaped, "\\u{unit:04x}");
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    /// All kinds of characters that do more than to be shown, and some that do not.
    const HOSTILE: &str = "a\u{1b}[2J\u{7f}\u{80}\u{9b}31m\u{9f}\u{202e}\u{2066}\u{feff}\u{e0041}\n\t\"\\ü虚\u{10ffff}";

    #[test]
    fn json_has_exact_values_and_nothing_that_drives_a_terminal() {
        let text = json(&[HOSTILE]).unwrap();
        assert!(!text.chars().any(is_unprintable), "{text:?}");
        let back: Vec<String> = serde_json::from_str(&text).unwrap();
        assert_eq!(back, [HOSTILE]);
        // As it reaches a pipe: AutoStream takes out what it takes for a terminal's.
        let mut piped = Vec::new();
        anstream::StripStream::new(&mut piped).write_all(text.as_bytes()).unwrap();
        assert_eq!(piped, text.as_bytes());
        assert!(
            text.contains("\\u009b31m\\u009f\\u202e")
                && text.contains("ü虚")
                && text.contains("\\udb40\\udc41")
        );
    }
}
