// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Public items: checks that the broker's public face stays small.
//!
//! The lint `unreachable_pub` sees to it that what is `pub` can be reached from other crates.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

/// The most items that other crates may see: types, functions, methods, constants and modules.
const MOST: [(&str, usize); 1] = [("kvmmem-broker", 39)];

/// The crates under `root` that have more.
pub(crate) fn too_many(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for (name, most) in MOST {
        let count = count(&root.join("crates").join(name).join("src"))?;
        if count > most {
            found.push(format!("{name}: {count} public items, {most} are allowed"));
        }
    }
    Ok(found)
}

fn count(folder: &Path) -> Result<usize> {
    let mut sum = 0;
    for entry in fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let path = entry?.path();
        if path.is_dir() {
            sum += count(&path)?;
        } else if path.extension().is_some_and(|end| end == "rs") {
            let text = fs::read_to_string(&path)?;
            sum += text.lines().filter(|line| is_public(line)).count();
        }
    }
    Ok(sum)
}

/// Whether a line begins a public item. What is exported again counts where it is.
fn is_public(line: &str) -> bool {
    const KINDS: [&str; 9] =
        ["fn", "const", "struct", "enum", "trait", "type", "static", "union", "mod"];
    let item = line.trim_start().strip_prefix("pub ");
    item.and_then(|item| item.split_once(' ')).is_some_and(|(kind, _)| KINDS.contains(&kind))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn items_count_and_fields_do_not() {
        for line in ["pub fn f() {}", "    pub const fn f() {}", "pub struct S;", "pub mod m;"] {
            assert!(is_public(line), "{line}");
        }
        for line in ["pub(crate) fn f() {}", "    pub uses: u32,", "pub use a::b;", "fn f() {}"] {
            assert!(!is_public(line), "{line}");
        }
    }

    #[test]
    fn this_project_keeps_the_rule() {
        assert_eq!(too_many(crate::project::root()).unwrap(), [""; 0]);
    }
}
