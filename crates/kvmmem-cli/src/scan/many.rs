// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Many patterns of bytes at once, by one automaton over copies: its time does not depend on how
//! many there are, and that of a pass over memory for each does.

use std::ops::Range;

use aho_corasick::AhoCorasick;
use anyhow::{Context, Result};

use super::pattern::Pattern;

/// From this number on one automaton is faster than a pass in place for each.
const MIN: usize = 24;

/// The patterns with a key: some bytes in a row, for which the automaton looks.
pub(super) struct Many {
    automaton: AhoCorasick,
    /// For each key, which pattern has it and at which of its bytes.
    keys: Vec<(usize, usize)>,
    /// The patterns without one.
    others: Vec<usize>,
}

impl Many {
    /// `None` where there are few patterns.
    pub(super) fn new(patterns: &[Pattern]) -> Result<Option<Self>> {
        if patterns.len() < MIN {
            return Ok(None);
        }
        let (mut keys, mut texts, mut others) = (Vec::new(), Vec::new(), Vec::new());
        for (number, pattern) in patterns.iter().enumerate() {
            match pattern.key() {
                Some((at, text)) => {
                    keys.push((number, at));
                    texts.push(text);
                }
                None => others.push(number),
            }
        }
        // Keys have letters of either case in lower case.
        let automaton = AhoCorasick::builder().ascii_case_insensitive(true).build(texts);
        let automaton = automaton.context("cannot search for so many patterns at once")?;
        Ok(Some(Self { automaton, keys, others }))
    }

    /// The patterns that are to be looked for one by one.
    pub(super) fn others(&self) -> &[usize] {
        &self.others
    }

    /// The matches that begin at one of the `starts` in `memory`, and which pattern each is of.
    pub(super) fn find<'a>(
        &'a self,
        patterns: &'a [Pattern],
        memory: &'a [u8],
        starts: Range<usize>,
    ) -> impl Iterator<Item = (usize, Range<usize>)> + 'a {
        let longest = self.keys.iter().filter_map(|(number, _)| Some(patterns.get(*number)?.len()));
        let end = starts.end.saturating_add(longest.max().unwrap_or(0)).min(memory.len());
        let within = memory.get(..end).unwrap_or_default();
        let input = aho_corasick::Input::new(within).span(starts.start.min(end)..end);
        self.automaton.find_overlapping_iter(input).filter_map(move |found| {
            let (number, at) = *self.keys.get(found.pattern().as_usize())?;
            let start = found.start().checked_sub(at).filter(|start| starts.contains(start))?;
            Some((number, patterns.get(number)?.at(memory, start)?))
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::pattern::Form;
    use super::*;

    proptest! {
        #[test]
        fn the_matches_are_those_of_each_pattern_by_itself(
            texts in proptest::collection::vec(("[ab?]{1,3}", any::<bool>()), MIN..2 * MIN),
            memory in proptest::collection::vec(proptest::sample::select(b"abAB\xaa\xbb\xab".to_vec()), 0..120),
            from in 0usize..60,
            count in 0usize..100,
        ) {
            let mut patterns: Vec<Pattern> = Vec::new();
            for (text, ignores_case) in &texts {
                let hex = text.replace('?', "??").replace('a', "aa").replace('b', "bb");
                patterns.extend(Pattern::new(Form::Hex, &hex, false));
                patterns.extend(Pattern::new(Form::Text, &text.replace('?', "b"), *ignores_case));
            }
            let many = Many::new(&patterns).unwrap().unwrap();
            let starts = from..from + count;
            let mut expected = Vec::new();
            for (number, pattern) in patterns.iter().enumerate() {
                if !many.others().contains(&number) {
                    expected.extend(pattern.find(&memory, starts.clone()).map(|found| (number, found)));
                }
            }
            let mut found: Vec<_> = many.find(&patterns, &memory, starts).collect();
            let order = |(number, found): &(usize, Range<usize>)| (*number, found.start);
            found.sort_by_key(order);
            expected.sort_by_key(order);
            prop_assert_eq!(found, expected);
        }
    }
}
