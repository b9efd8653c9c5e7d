// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file of patterns: a line for each, with its name, its form and the pattern.

use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail, ensure};

use super::pattern::{Form, Pattern};
use crate::text_file::{self, utf8};

/// Bytes that a file may have.
const MAX_LEN: u64 = 1 << 20;

const FORM: &str = "write NAME hex|text|utf16|regex PATTERN";

/// Reads a file of patterns.
pub(super) fn read(path: &Path, ignores_case: bool) -> Result<Vec<Pattern>> {
    let read = || {
        let mut bytes = Vec::new();
        text_file::open(path)?.take(MAX_LEN + 1).read_to_end(&mut bytes)?;
        ensure!(bytes.len() as u64 <= MAX_LEN, "the file has more than {MAX_LEN} bytes");
        parse(&utf8(bytes)?, ignores_case)
    };
    read().with_context(|| format!("cannot take the patterns in {}", path.display()))
}

fn parse(text: &str, ignores_case: bool) -> Result<Vec<Pattern>> {
    let lines = text.lines().enumerate().map(|(number, line)| (number + 1, line.trim()));
    let lines = lines.filter(|(_, line)| !line.is_empty() && !line.starts_with('#'));
    let patterns: Vec<Pattern> = lines
        .map(|(number, line)| pattern(line, ignores_case).with_context(|| format!("line {number}")))
        .collect::<Result<_>>()?;
    ensure!(!patterns.is_empty(), "there is no pattern: {FORM}, one a line");
    Ok(patterns)
}

fn pattern(line: &str, ignores_case: bool) -> Result<Pattern> {
    let (name, rest) = line.split_once(char::is_whitespace).context(FORM)?;
    let (form, text) = rest.trim_start().split_once(char::is_whitespace).context(FORM)?;
    let form = match form {
        "hex" => Form::Hex,
        "text" => Form::Text,
        "utf16" => Form::Utf16,
        "regex" => Form::Regex,
        other => bail!("{other:?} is not a form of a pattern: {FORM}"),
    };
    let pattern =
        Pattern::new(form, text.trim_start(), ignores_case).map_err(|error| anyhow!(error))?;
    Ok(pattern.named(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_is_not_text_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&file, b"a hex 00\nb text \xff\n").unwrap();
        let error = format!("{:#}", read(file.path(), false).err().unwrap());
        assert!(
            error.ends_with("line 2 is not UTF-8 text: write such bytes in hexadecimal"),
            "{error}"
        );
        assert!(error.contains(&file.path().display().to_string()), "{error}");
    }

    #[test]
    fn patterns_have_names_and_forms() {
        let text = "# keys\n\nmz  hex 4d 5a\r\npassword text pass word \n\tkey utf16 k\nmail regex [a-z]+@example\n";
        let patterns = parse(text, false).unwrap();
        let names: Vec<&str> = patterns.iter().map(Pattern::name).collect();
        assert_eq!(names, ["mz", "password", "key", "mail"]);
        let memory = b"MZ pass word k\0 me@example";
        let found: Vec<_> = patterns
            .iter()
            .map(|pattern| pattern.find(memory, 0..memory.len()).next().unwrap())
            .collect();
        assert_eq!(found, [0..2, 3..12, 13..15, 16..26]);
    }

    #[test]
    fn mistakes_are_told_with_their_line() {
        for (text, words) in [
            ("", "there is no pattern"),
            ("a text x\nb", "line 2: write NAME"),
            ("a text", "line 1: write NAME"),
            ("a word x", "\"word\" is not a form"),
            ("a hex zz", "line 1: write bytes as"),
        ] {
            let error = format!("{:#}", parse(text, false).unwrap_err());
            assert!(error.contains(words), "{text}: {error}");
        }
    }
}
