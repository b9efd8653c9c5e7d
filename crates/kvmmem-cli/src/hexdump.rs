// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory as text: sixteen bytes a line, repeated lines left out.

use clap::builder::styling::Style;

/// Bytes of a line.
pub(crate) const WIDTH: usize = 16;

/// A dump that may be fed in parts.
#[derive(Default)]
pub(crate) struct Hexdump {
    last: Option<[u8; WIDTH]>,
    is_skipping: bool,
}

impl Hexdump {
    /// The lines for `bytes`, which begin at `address`.
    pub(crate) fn lines(&mut self, address: u64, bytes: &[u8]) -> Vec<String> {
        let mut lines = Vec::new();
        let mut at = address;
        for chunk in bytes.chunks(WIDTH) {
            let whole = <[u8; WIDTH]>::try_from(chunk).ok();
            if whole.is_some() && whole == self.last {
                if !self.is_skipping {
                    lines.push("*".to_owned());
                }
                self.is_skipping = true;
            } else {
                self.is_skipping = false;
                lines.push(line(at, chunk, |_| None));
            }
            self.last = whole;
            at = at.wrapping_add(chunk.len() as u64);
        }
        lines
    }
}

/// One line of at most sixteen bytes; `style` gives the style of each on a terminal.
pub(crate) fn line(address: u64, bytes: &[u8], style: impl Fn(usize) -> Option<Style>) -> String {
    let (mut hex, mut text) = (String::new(), String::new());
    for (index, &byte) in bytes.iter().enumerate() {
        let printed = if (0x20..0x7f).contains(&byte) { char::from(byte) } else { '.' };
        let gap = if index == WIDTH / 2 { "  " } else { " " };
        match style(index) {
            Some(style) => {
                hex += &format!("{gap}{style}{byte:02x}{style:#}");
                text += &format!("{style}{printed}{style:#}");
            }
            None => {
                hex += &format!("{gap}{byte:02x}");
                text.push(printed);
            }
        }
    }
    let missing = WIDTH - bytes.len().min(WIDTH);
    let gap = usize::from(bytes.len() <= WIDTH / 2);
    let pad = " ".repeat(3 * missing + gap);
    format!("{address:012x} {hex}{pad}  |{text}|")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_look_the_usual_way() {
        let lines = Hexdump::default().lines(0x1000, b"0123456789abcdefgh\x00\x7f\xff");
        assert_eq!(
            lines,
            [
                "000000001000  30 31 32 33 34 35 36 37  38 39 61 62 63 64 65 66  |0123456789abcdef|",
                "000000001010  67 68 00 7f ff                                    |gh...|",
            ]
        );
    }

    #[test]
    fn styled_bytes_take_no_more_room() {
        let bold = Style::new().bold();
        for len in [1, 8, 9, 16] {
            let bytes = &b"0123456789abcdef"[..len];
            let plain = line(0, bytes, |_| None);
            let styled = line(0, bytes, |at| (at % 2 == 0).then_some(bold));
            assert_ne!(styled, plain);
            assert_eq!(anstream::adapter::strip_str(&styled).to_string(), plain);
            assert_eq!(plain.find('|'), Some(64));
        }
    }

    #[test]
    fn repeated_lines_are_left_out_also_across_parts() {
        let mut dump = Hexdump::default();
        let first = dump.lines(0, &[0; 64]);
        assert_eq!(first.len(), 2);
        assert_eq!(first[1], "*");
        assert!(dump.lines(64, &[0; 32]).is_empty());
        assert!(dump.lines(96, &[1; 16])[0].starts_with("000000000060"));
    }
}
