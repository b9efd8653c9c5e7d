// SPDX-License-Identifier: Apache-2.0 OR MIT
//! A file with a grant's token.

use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, Result};
use kvmmem::Token;
use serde::Deserialize;
use zeroize::Zeroizing;

use crate::text_file;

/// The largest file that is read for a token, bytes.
const MAX_TOKEN_FILE: u64 = 16 * 1024;

/// Reads the token in a file; `-` is standard input.
pub(crate) fn read_token(path: &Path) -> Result<Token> {
    let mut text = Zeroizing::new(String::with_capacity(usize::try_from(MAX_TOKEN_FILE)?));
    if path == Path::new("-") {
        io::stdin().take(MAX_TOKEN_FILE).read_to_string(&mut text)?;
    } else {
        text_file::open(path)?.take(MAX_TOKEN_FILE).read_to_string(&mut text)?;
    }
    parse_token(&text)
}

/// The token alone, or in what `kvmmem grant create` prints: lines of text with one `token HEX`, or
/// JSON.
pub(crate) fn parse_token(text: &str) -> Result<Token> {
    #[derive(Deserialize)]
    struct GrantLine<'a> {
        token: &'a str,
    }
    let text = text.trim();
    if text.starts_with('{') {
        let granted: GrantLine = serde_json::from_str(text)
            .context("this JSON is not what kvmmem grant create prints")?;
        return Ok(granted.token.parse()?);
    }
    let token = text.lines().find_map(|line| line.trim().strip_prefix("token ")).unwrap_or(text);
    Ok(token.trim().parse()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_read_from_a_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("token");
        std::fs::write(&path, format!("  {}\n", "0f".repeat(32))).unwrap();
        assert_eq!(read_token(&path).unwrap().words(), [0x0f0f_0f0f_0f0f_0f0f; 4]);
        let token = "0f".repeat(32);
        for text in [
            format!("grant 3\ntoken {token}\n"),
            format!("{{\"grant\":3,\"token\":\"{token}\",\"spans\":null}}\n"),
        ] {
            std::fs::write(&path, text).unwrap();
            assert_eq!(read_token(&path).unwrap().words(), [0x0f0f_0f0f_0f0f_0f0f; 4]);
        }
        for text in ["{}", "grant 3\n", "token\n", "token x\n", "{\"token\":3}"] {
            std::fs::write(&path, text).unwrap();
            assert!(read_token(&path).is_err(), "{text}");
        }
        std::fs::write(&path, [0xff; 64]).unwrap();
        assert!(read_token(&path).is_err());
        assert!(read_token(&directory.path().join("none")).is_err());
        // As large as it likes to be.
        assert!(read_token(Path::new("/dev/zero")).is_err());
    }
}
