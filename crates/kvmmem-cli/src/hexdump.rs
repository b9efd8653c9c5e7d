// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Memory as text: sixteen bytes a line, repeated lines left out.

const WIDTH: usize = 16;

/// A dump that may be fed in parts.
#[derive(Default)]
pub(crate) struct Hexdump {
    last: Option<[u8; WIDTH]>,
    is_skipping: bool,
}

impl Hexdump {
    /// The lines for `bytes`, the first of which is at `address`.
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
                lines.push(line(at, chunk));
            }
            self.last = whole;
            at = at.wrapping_add(chunk.len() as u64);
        }
        lines
    }
}

fn line(address: u64, bytes: &[u8]) -> String {
    let mut hex = String::with_capacity(3 * WIDTH + 1);
    for (index, byte) in bytes.iter().enumerate() {
        if index == WIDTH / 2 {
            hex.push(' ');
        }
        hex += &format!(" {byte:02x}");
    }
    let text: String =
        bytes.iter().map(|&byte| if (0x20..0x7f).contains(&byte) { char::from(byte) } else { '.' }).collect();
    format!("{address:012x} {hex:<49}  |{text}|")
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
    fn repeated_lines_are_left_out_also_across_parts() {
        let mut dump = Hexdump::default();
        let first = dump.lines(0, &[0; 64]);
        assert_eq!(first.len(), 2);
        assert_eq!(first[1], "*");
        assert!(dump.lines(64, &[0; 32]).is_empty());
        assert!(dump.lines(96, &[1; 16])[0].starts_with("000000000060"));
    }
}
