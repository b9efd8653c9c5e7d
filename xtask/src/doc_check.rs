// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The documentation names files and sections that exist, tables have short cells, and the README
//! stays short.
//!
//! Part of suite `style`. A link in a page is relative to it; `docs/...` in code, in messages and
//! in pages is relative to the root.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Component, Path, PathBuf};

use anyhow::{Context as _, Result};

use crate::tree;

/// Where pages, and mentions of pages, are.
const FOLDERS: [&str; 7] = ["crates", "docs", "examples", "kernel", "packaging", "tests", "xtask"];

const README_LINES: usize = 80;

/// The most characters that a reader sees of a table's cell.
const CELL: usize = 80;

/// What is wrong under `root`: each broken link or mention and each wide cell with its file and
/// line, and a README that is too long.
pub(crate) fn mistakes(root: &Path) -> Result<Vec<String>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(root)? {
        let path = PathBuf::from(entry?.file_name());
        if is_page(&path) {
            let text = fs::read_to_string(root.join(&path));
            files.push((path, text?));
        }
    }
    for folder in FOLDERS.iter().filter(|folder| root.join(folder).is_dir()) {
        files.extend(tree::files(root, folder, &["md", "rs", "c"])?);
    }
    files.sort();
    let mut found = Vec::new();
    // The tests below name pages that are not there.
    for (file, text) in files.iter().filter(|(it, _)| !it.ends_with("xtask/src/doc_check.rs")) {
        for (index, line) in text.lines().enumerate() {
            let links = links(line).filter(|_| is_page(file)).map(|link| (link, file.as_path()));
            let mentions = mentions(line).map(|mention| (mention, Path::new("README.md")));
            // In the README a link is a mention too.
            for (target, base) in links.chain(mentions).collect::<BTreeSet<_>>() {
                if !exists(root, base, target)? {
                    found.push(format!("{}:{}: {target}: no such page", file.display(), index + 1));
                }
            }
            if let Some(cell) = cells(line).filter(|_| is_page(file)).find(|cell| *cell > CELL) {
                let place = format!("{}:{}", file.display(), index + 1);
                found.push(format!("{place}: a cell of {cell} characters, more than {CELL}"));
            }
        }
        let lines = text.lines().count();
        if file == Path::new("README.md") && lines > README_LINES {
            found.push(format!("README.md has {lines} lines, more than {README_LINES}"));
        }
    }
    Ok(found)
}

fn is_page(path: &Path) -> bool {
    path.extension().is_some_and(|end| end == "md")
}

/// The targets of a line's links that are in this repository.
fn links(line: &str) -> impl Iterator<Item = &str> {
    let parts = line.split("](").skip(1);
    parts
        .filter_map(|part| part.split_once(')'))
        .map(|(target, _)| target)
        .filter(|target| !target.contains(':'))
}

/// How many characters a reader sees of each cell of a table's row.
fn cells(line: &str) -> impl Iterator<Item = usize> {
    let row = line.strip_prefix('|').unwrap_or_default().replace("\\|", "/");
    let seen = |cell: &str| {
        let mut parts = cell.split("](");
        let first = parts.next().unwrap_or_default();
        let rest = parts.filter_map(|part| part.split_once(')')).map(|(_, after)| after);
        std::iter::once(first).chain(rest).map(|part| part.trim_matches(' ').chars().count()).sum()
    };
    row.split('|').map(seen).collect::<Vec<_>>().into_iter()
}

/// The pages in docs/ that a line names from the root.
fn mentions(line: &str) -> impl Iterator<Item = &str> {
    let is_name = |one: char| one.is_ascii_alphanumeric() || "-_./".contains(one);
    line.split(move |one| !is_name(one))
        .map(|word| word.trim_end_matches('.'))
        .filter(|word| word.starts_with("docs/") && word.ends_with(".md"))
}

/// Whether `target`, as the page `base` has it, is a file, and has the section.
fn exists(root: &Path, base: &Path, target: &str) -> Result<bool> {
    let (path, section) = target.split_once('#').unwrap_or((target, ""));
    let path = if path.is_empty() { base.to_owned() } else { base.with_file_name(path) };
    let mut plain = PathBuf::new();
    for part in path.components() {
        if part != Component::ParentDir {
            plain.push(part);
        } else if !plain.pop() {
            return Ok(false);
        }
    }
    let path = root.join(plain);
    if section.is_empty() || !path.is_file() {
        return Ok(path.exists());
    }
    let text = fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    Ok(text.lines().filter_map(heading).any(|heading| anchor(heading) == section))
}

fn heading(line: &str) -> Option<&str> {
    let text = line.trim_start_matches('#');
    (text.len() < line.len()).then(|| text.strip_prefix(' ')).flatten()
}

/// The name of a heading in links.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|one| one.is_alphanumeric() || " -_".contains(*one));
    kept.map(|one| if one == ' ' { '-' } else { one.to_ascii_lowercase() }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_documentation_of_this_project_is_right() {
        assert_eq!(mistakes(crate::project::root()).unwrap(), [""; 0]);
    }

    #[test]
    fn broken_links_and_mentions_are_named() {
        let root = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = root.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("README.md", "[a](docs/a.md)\n[b](docs/b.md) [web](https://example.org/none.md)\n");
        write("docs/a.md", "# A `page`, twice\n[up](../README.md) [x](#a-page-twice) [y](#none)\n");
        write("docs/in/c.md", "[a](../a.md#a-page-twice) [b](../a.md#b) [out](../../../x.md)\n");
        write("crates/a/src/lib.rs", "// See docs/a.md.\n// See docs/old.md. [x](not-a-page)\n");
        write("crates/a/target/out.md", "[none](none.md)\n");
        assert_eq!(
            mistakes(root.path()).unwrap(),
            [
                "README.md:2: docs/b.md: no such page",
                "crates/a/src/lib.rs:2: docs/old.md: no such page",
                "docs/a.md:2: #none: no such page",
                "docs/in/c.md:1: ../../../x.md: no such page",
                "docs/in/c.md:1: ../a.md#b: no such page",
            ]
        );
    }

    #[test]
    fn a_wide_cell_is_named() {
        let root = tempfile::tempdir().unwrap();
        let row = |cell: &str| format!("| a | {cell} |\n");
        let narrow = row(&"x".repeat(CELL)) + &row(&format!("[x](#{})", "x".repeat(CELL)));
        let text = format!("# {}\n{narrow}{}", "x".repeat(CELL), row(&"x".repeat(CELL + 1)));
        fs::write(root.path().join("PAGE.md"), text).unwrap();
        let found = mistakes(root.path()).unwrap();
        assert_eq!(found.last().unwrap(), "PAGE.md:4: a cell of 81 characters, more than 80");
    }

    #[test]
    fn a_long_readme_is_named() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("README.md"), "line\n".repeat(README_LINES)).unwrap();
        assert_eq!(mistakes(root.path()).unwrap(), [""; 0]);
        fs::write(root.path().join("README.md"), "line\n".repeat(README_LINES + 1)).unwrap();
        assert_eq!(mistakes(root.path()).unwrap(), ["README.md has 81 lines, more than 80"]);
    }
}
