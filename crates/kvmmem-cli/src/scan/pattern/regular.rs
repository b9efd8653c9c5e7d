// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Regular expressions over bytes.

use std::fmt::Write;
use std::ops::Range;

use regex::bytes::{Regex, RegexBuilder};
use regex_syntax::ParserBuilder;

use super::bytes::MAX_LEN;

#[derive(Clone, Debug)]
pub(super) struct Regular(Regex);

impl Regular {
    /// Reads an expression in the syntax of crate `regex`, without Unicode: `.` and `\w` are about
    /// bytes.
    pub(super) fn new(text: &str, ignores_case: bool) -> Result<Self, String> {
        let regex = RegexBuilder::new(text).unicode(false).case_insensitive(ignores_case).build();
        let regex = regex.map_err(|error| {
            // The parser draws the place under the expression, in several lines.
            let text = error.to_string();
            text.lines().last().unwrap_or(&text).trim().trim_start_matches("error: ").to_owned()
        })?;
        let syntax = ParserBuilder::new().unicode(false).utf8(false).build().parse(text);
        let least = syntax.ok().and_then(|syntax| syntax.properties().minimum_len());
        if let Some(least) = least.filter(|least| *least > MAX_LEN) {
            return Err(format!(
                "a match has at least {least} bytes, and only those of at most {MAX_LEN} are found"
            ));
        }
        if regex.is_match(b"") {
            return Err(
                "the expression matches no bytes at all, and so everywhere: write + for *, for example"
                    .into(),
            );
        }
        Ok(Self(regex))
    }

    /// The text with each letter in any case, as `encode` has it.
    pub(super) fn folded(text: &str, encode: impl Fn(char) -> Vec<u8>) -> Result<Self, String> {
        let mut expression = String::new();
        for letter in text.chars() {
            let mut cases: Vec<char> = letter.to_lowercase().chain(letter.to_uppercase()).collect();
            // A case of several letters, as that of ß, is not one of this letter.
            if cases.len() > 2 {
                cases = vec![letter];
            }
            cases.push(letter);
            cases.sort_unstable();
            cases.dedup();
            let cases: Vec<String> = cases
                .into_iter()
                .map(|case| {
                    encode(case).iter().fold(String::new(), |mut bytes, byte| {
                        // Writing to a string does not fail.
                        let _ = write!(bytes, "\\x{byte:02x}");
                        bytes
                    })
                })
                .collect();
            expression += &format!("(?:{})", cases.join("|"));
        }
        Self::new(&expression, false)
    }

    /// The matches that begin at one of the `starts`. Each is as long as it can be, up to
    /// [`MAX_LEN`], and the next one begins after it.
    pub(super) fn find<'a>(
        &'a self,
        memory: &'a [u8],
        starts: Range<usize>,
    ) -> impl Iterator<Item = Range<usize>> + 'a {
        let mut from = starts.start.saturating_sub(MAX_LEN);
        let found = std::iter::from_fn(move || {
            let found = self.0.find_at(memory, from)?;
            let end = found.end().min(found.start() + MAX_LEN);
            from = end.max(found.start() + 1);
            Some(found.start()..end)
        });
        // An empty match in the middle, as of \b, does not count.
        found
            .skip_while(move |found| found.start < starts.start)
            .take_while(move |found| found.start < starts.end)
            .filter(|found| !found.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find(text: &str, memory: &[u8], starts: Range<usize>) -> Vec<(usize, usize)> {
        let regular = Regular::new(text, false).unwrap();
        regular.find(memory, starts).map(|found| (found.start, found.end)).collect()
    }

    #[test]
    fn expressions_are_about_bytes() {
        assert_eq!(find(r"a.c", b"a\xffc abc", 0..7), [(0, 3), (4, 7)]);
        assert_eq!(find(r"\xff\x00+", b"\xff\0\0\xff", 0..4), [(0, 3)]);
        assert_eq!(find("ü", "aü".as_bytes(), 0..3), [(1, 3)]);
        assert!(find(r"\b", b"ab cd", 0..5).is_empty());
        for (text, words) in [
            ("a*", "everywhere"),
            ("(", "unclosed"),
            ("", "everywhere"),
            ("a{1000}{1000}{1000}", "size limit"),
            ("(a|b){10000}", "at least 10000 bytes"),
            (r"\xff{4097}", "at most 4096"),
        ] {
            let error = Regular::new(text, false).unwrap_err();
            assert!(error.contains(words) && !error.contains('\n'), "{text}: {error}");
        }
    }

    #[test]
    fn matches_do_not_depend_on_where_the_search_began() {
        let memory: Vec<u8> = b"word ".iter().cycle().copied().take(10_000).collect();
        let whole = find("[a-z]+", &memory, 0..memory.len());
        assert_eq!(whole.len(), 2000);
        for cut in [1, 5000, 5003, 9999] {
            let mut parts = find("[a-z]+", &memory, 0..cut);
            parts.extend(find("[a-z]+", &memory, cut..memory.len()));
            assert_eq!(parts, whole, "{cut}");
        }
        assert_eq!(find("(a|b){4096}", &[b'a'; 5000], 0..5000), [(0, 4096)]);
        // Longer ones are cut.
        assert_eq!(find("a+", &[b'a'; 5000], 0..5000), [(0, 4096), (4096, 5000)]);
    }
}
