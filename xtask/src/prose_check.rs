// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Comments name the party that acts: the client, the VMM, the guest.
//!
//! Part of suite `style`. It knows a few words that always hide the party or the field's term, and
//! looks for them in the comments of [`FOLDERS`].

use std::path::Path;

use anyhow::Result;

use crate::tree;

/// Where comments are checked.
const FOLDERS: [&str; 4] = ["crates", "kernel", "tests", "xtask"];

/// A word to avoid, and what to write.
const AVOID: [(&str, &str); 8] = [
    ("whoever", "name the party"),
    ("nobody", "name the party"),
    ("somebody", "name the party"),
    ("whatever", "name what it may be"),
    ("takes note", "records"),
    ("taken back", "revoked"),
    ("lets go", "releases"),
    ("let go of", "release"),
];

/// The comments under `root` with a word to avoid, each with its file and line.
pub(crate) fn mistakes(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for folder in FOLDERS {
        for (path, text) in tree::files(root, folder, &["rs"])? {
            let path = path.display();
            found.extend(
                words(&text)
                    .map(|(line, word, remedy)| format!("{path}:{line}: {word:?}: {remedy}")),
            );
        }
    }
    Ok(found)
}

/// The lines of comments with a word to avoid, and what to write.
fn words(text: &str) -> impl Iterator<Item = (usize, &'static str, &'static str)> {
    text.lines().enumerate().filter_map(|(index, line)| {
        let comment = line.trim_start().strip_prefix("//")?.to_lowercase();
        let (word, remedy) = AVOID.into_iter().find(|(word, _)| comment.contains(word))?;
        Some((index + 1, word, remedy))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_in_comments_alone() {
        let text =
            "let nobody = 1; // is not a line of comment\n    /// Nobody waits.\n//! It lets go.\n";
        let found: Vec<_> = words(text).collect();
        assert_eq!(found, [(2, "nobody", "name the party"), (3, "lets go", "releases")]);
    }

    #[test]
    fn this_project_keeps_the_rule() {
        assert_eq!(mistakes(crate::project::root()).unwrap(), [""; 0]);
    }
}
