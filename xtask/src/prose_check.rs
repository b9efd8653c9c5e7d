// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Comments and documents name the party that acts: the client, the VMM, the guest.
//!
//! Part of suite `style`. It knows a few words that always hide the party or the field's term, and
//! looks for them in the comments of code and in the text of Markdown files, code left out.

use std::fs;
use std::path::Path;

use anyhow::Result;

use crate::tree;

/// Where prose is checked, beside the Markdown files at the top.
const FOLDERS: [&str; 8] =
    ["crates", "docs", "examples", "fuzz", "kernel", "packaging", "tests", "xtask"];

/// The kinds of files that are checked.
const ENDS: [&str; 6] = ["rs", "c", "h", "sh", "toml", "md"];

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

/// The prose under `root` with a word to avoid, each with its file and line.
pub(crate) fn mistakes(root: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(root)? {
        let name = entry?.file_name();
        if Path::new(&name).extension().is_some_and(|end| end == "md") {
            files.push((name.clone().into(), fs::read_to_string(root.join(name))?));
        }
    }
    for folder in FOLDERS {
        files.extend(tree::files(root, folder, &ENDS)?);
    }
    let mut found = Vec::new();
    for (path, text) in files {
        let end = path.extension().and_then(|end| end.to_str()).unwrap_or_default();
        let path = path.display();
        found.extend(
            words(end, &text)
                .map(|(line, word, remedy)| format!("{path}:{line}: {word:?}: {remedy}")),
        );
    }
    Ok(found)
}

/// The lines of prose with a word to avoid, and what to write.
fn words(end: &str, text: &str) -> impl Iterator<Item = (usize, &'static str, &'static str)> {
    // A comment of C, or a block of code in Markdown.
    let mut is_open = false;
    text.lines().enumerate().filter_map(move |(index, line)| {
        let prose = match end {
            "md" => markdown(line, &mut is_open),
            "c" | "h" => c_comment(line, &mut is_open),
            "rs" => line.trim_start().strip_prefix("//")?.to_owned(),
            _ => line.trim_start().strip_prefix('#')?.to_owned(),
        };
        let prose = prose.to_lowercase();
        let (word, remedy) = AVOID.into_iter().find(|(word, _)| prose.contains(word))?;
        Some((index + 1, word, remedy))
    })
}

/// The text of a line of Markdown, without code.
fn markdown(line: &str, is_code: &mut bool) -> String {
    if line.trim_start().starts_with("```") {
        *is_code = !*is_code;
    } else if !*is_code {
        return line.split('`').step_by(2).collect();
    }
    String::new()
}

/// What a line of C has of comments.
fn c_comment(line: &str, is_open: &mut bool) -> String {
    if !*is_open && let Some(comment) = line.trim_start().strip_prefix("//") {
        return comment.to_owned();
    }
    let (mut comment, mut rest) = (String::new(), line);
    loop {
        let mark = if *is_open { "*/" } else { "/*" };
        let (before, after) = rest.split_once(mark).unzip();
        if *is_open {
            comment.push_str(before.unwrap_or(rest));
        }
        let Some(after) = after else { return comment };
        *is_open = !*is_open;
        rest = after;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_word_is_found_in_comments_alone() {
        let text =
            "let nobody = 1; // is not a line of comment\n    /// Nobody waits.\n//! It lets go.\n";
        let found: Vec<_> = words("rs", text).collect();
        assert_eq!(found, [(2, "nobody", "name the party"), (3, "lets go", "releases")]);
    }

    fn lines(end: &str, text: &str) -> Vec<usize> {
        words(end, text).map(|(line, ..)| line).collect()
    }

    #[test]
    fn c_has_comments_behind_code_and_over_several_lines() {
        let text = "int nobody; /* one */ int whoever; /* taken back */\n/* it begins\n\
                    * nobody */ int nobody;\n// whatever\nfail(\"nobody\");\n";
        assert_eq!(lines("c", text), [1, 3, 4]);
    }

    #[test]
    fn scripts_and_settings_have_comments_of_whole_lines() {
        assert_eq!(lines("sh", "setpriv --reuid nobody\n\t# Whoever asks.\n"), [2]);
    }

    #[test]
    fn code_in_markdown_is_not_prose() {
        let text = "Run `sudo -u nobody` as nobody.\n```\nsudo -u nobody\n```\nSomebody `nobody`\n`nobody` runs\n";
        assert_eq!(lines("md", text), [1, 5]);
    }

    #[test]
    fn this_project_keeps_the_rule() {
        assert_eq!(mistakes(crate::project::root()).unwrap(), [""; 0]);
    }
}
