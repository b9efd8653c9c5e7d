// SPDX-License-Identifier: Apache-2.0 OR MIT
//! What a guest's own /proc shows, as `tests/linux/scene.c` writes it.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, bail};

/// Files by path, and symbolic links by `->` and path.
#[derive(Debug, Default)]
pub(crate) struct Truth(BTreeMap<String, Vec<u8>>);

impl Truth {
    /// Reads the sections up to the one that is the last.
    pub(crate) fn parse(bytes: &[u8]) -> Result<Self> {
        let mut sections = BTreeMap::new();
        let mut rest = bytes;
        while let Some((path, bytes, behind)) = section(rest) {
            if path == "end" {
                return Ok(Self(sections));
            }
            sections.insert(path, bytes.to_vec());
            rest = behind;
        }
        bail!("the guest's truth has no end");
    }

    /// A file's bytes.
    pub(crate) fn bytes(&self, path: &str) -> Result<&[u8]> {
        self.0
            .get(path)
            .map(Vec::as_slice)
            .with_context(|| format!("the guest's truth has no {path}"))
    }

    /// A file's text; what is not UTF-8 is replaced.
    pub(crate) fn text(&self, path: &str) -> Result<String> {
        Ok(String::from_utf8_lossy(self.bytes(path)?).into_owned())
    }

    /// All paths and bytes that begin with `prefix`.
    pub(crate) fn below<'a>(
        &'a self,
        prefix: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a [u8])> {
        self.0
            .range(prefix.to_owned()..)
            .take_while(move |(path, _)| path.starts_with(prefix))
            .map(|(path, bytes)| (path.as_str(), bytes.as_slice()))
    }
}

/// The first section's path and bytes, and what follows it. A path may hold spaces.
fn section(bytes: &[u8]) -> Option<(String, &[u8], &[u8])> {
    let line = bytes.strip_prefix(b"@")?.split(|byte| *byte == b'\n').next()?;
    let (path, length) = std::str::from_utf8(line).ok()?.rsplit_once(' ')?;
    let start = 1 + line.len() + 1;
    let end = start.checked_add(length.parse().ok()?)?;
    Some((path.to_owned(), bytes.get(start..end)?, bytes.get(end + 1..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sections_hold_any_bytes_and_one_that_is_cut_off_is_refused() {
        let bytes = b"@/proc/a b 4\n\n@x \n@->/proc/b 1\nc\n@end 0\n\nrest";
        let truth = Truth::parse(bytes).unwrap();
        assert_eq!(truth.bytes("/proc/a b").unwrap(), b"\n@x ");
        assert_eq!(truth.text("->/proc/b").unwrap(), "c");
        assert!(truth.bytes("/proc/c").is_err());
        assert_eq!(truth.below("/proc").count(), 1);
        for length in 0..38 {
            assert!(Truth::parse(&bytes[..length]).is_err(), "{length}");
        }
    }
}
