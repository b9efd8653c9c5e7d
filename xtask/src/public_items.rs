// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Public items: checks that the broker's public face stays small.
//!
//! The lint `unreachable_pub` sees to it that what is `pub` can be reached from other crates.

use std::path::Path;

use anyhow::Result;

use crate::tree;

/// The most items that other crates may see: types, functions, methods, constants and modules.
const MOST: [(&str, usize); 1] = [("kvmmem-broker", 39)];

/// The crates under `root` that have more.
pub(crate) fn too_many(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for (name, most) in MOST {
        let files = tree::files(root, Path::new("crates").join(name).join("src"), &["rs"])?;
        let lines = files.iter().flat_map(|(_, text)| text.lines());
        let count = lines.filter(|line| is_public(line)).count();
        if count > most {
            found.push(format!("{name}: {count} public items, {most} are allowed"));
        }
    }
    Ok(found)
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
