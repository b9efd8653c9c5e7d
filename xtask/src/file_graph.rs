// SPDX-License-Identifier: Apache-2.0 OR MIT
//! File graph: checks that the files of a crate use each other in one direction only.
//!
//! A file uses another one where it names an item by `crate::`, `super::`, `self::` or by the name
//! of a module that it declares. A file that only declares a module does not use it. Tests do not
//! count, nor do methods that are called on a type of another file.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result};

type Module = Vec<String>;
type Tokens<'a> = std::iter::Peekable<std::slice::Iter<'a, String>>;
type Graph = BTreeMap<Module, BTreeSet<Module>>;

/// The circles in the crates under `root`, one a line.
pub(crate) fn circles(root: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for folder in fs::read_dir(root.join("crates"))? {
        let folder = folder?;
        let name = folder.file_name().to_string_lossy().into_owned();
        let source = folder.path().join("src");
        if !source.join("lib.rs").exists() {
            continue;
        }
        let mut graph = Graph::new();
        read(&source, &Module::new(), &mut graph, &mut BTreeMap::new())?;
        found.extend(in_circles(&graph).iter().map(|circle| {
            let names: Vec<_> = circle.iter().map(|module| module.join("::")).collect();
            format!("{name}: {}", names.join(", "))
        }));
    }
    found.sort();
    Ok(found)
}

/// Adds a module's file and those below it to the graph.
fn read(
    source: &Path,
    module: &Module,
    graph: &mut Graph,
    paths: &mut BTreeMap<Module, Vec<Vec<String>>>,
) -> Result<()> {
    let file = match module.is_empty() {
        true => source.join("lib.rs"),
        false => source.join(module.join("/")).with_extension("rs"),
    };
    let file = if file.exists() { file } else { source.join(module.join("/")).join("mod.rs") };
    let text = fs::read_to_string(&file).with_context(|| file.display().to_string())?;
    let tokens = tokens(&code(&text));
    let children: Vec<String> = tokens
        .windows(3)
        .filter_map(|three| match three {
            [before, name, after] if before == "mod" && after == ";" => Some(name.clone()),
            _ => None,
        })
        .collect();
    graph.insert(module.clone(), BTreeSet::new());
    paths.insert(module.clone(), named(&tokens, &children));
    for child in children {
        read(source, &[&module[..], &[child]].concat(), graph, paths)?;
    }
    if module.is_empty() {
        for (module, names) in paths.iter() {
            let used: BTreeSet<Module> =
                names.iter().map(|name| resolve(graph, module, name)).collect();
            graph.insert(module.clone(), used.into_iter().filter(|used| used != module).collect());
        }
    }
    Ok(())
}

/// The file of what a path names.
fn resolve(graph: &Graph, module: &Module, path: &[String]) -> Module {
    let mut at = module.clone();
    let mut path = path;
    while let [first, rest @ ..] = path {
        match first.as_str() {
            "crate" => at.clear(),
            "super" => drop(at.pop()),
            "self" => {}
            _ if graph.contains_key(&[&at[..], std::slice::from_ref(first)].concat()) => {
                at.push(first.clone());
            }
            _ => break,
        }
        path = rest;
    }
    at
}

/// The paths that a file names and that may be of this crate; each branch of a `use` is one.
fn named(tokens: &[String], children: &[String]) -> Vec<Vec<String>> {
    let (mut all, mut tokens) = (Vec::new(), tokens.iter().peekable());
    while let Some(&token) = tokens.peek() {
        if token == "use" {
            tokens.next();
            branch(&mut tokens, &[], &mut all);
        } else if is_word(token) {
            all.push(segments(&mut tokens));
        } else {
            tokens.next();
            // What follows `::` without a word before it is not of this crate.
            if token == "::" {
                segments(&mut tokens);
            }
        }
    }
    let is_of_crate = |path: &Vec<String>| {
        path.len() > 1
            && path.first().is_some_and(|first| {
                matches!(first.as_str(), "crate" | "super" | "self") || children.contains(first)
            })
    };
    all.retain(is_of_crate);
    all
}

/// Reads one branch of a `use`, with those in its braces.
fn branch(tokens: &mut Tokens<'_>, before: &[String], all: &mut Vec<Vec<String>>) {
    let path = [before, &segments(tokens)].concat();
    if tokens.next_if(|token| *token == "{").is_none() {
        all.push(path);
        return;
    }
    while tokens.next_if(|token| *token == "}").is_none() {
        branch(tokens, &path, all);
        while tokens.next_if(|token| *token != "," && *token != "}").is_some() {}
        tokens.next_if(|token| *token == ",");
        if tokens.peek().is_none() {
            return;
        }
    }
}

/// Reads words with `::` between them.
fn segments(tokens: &mut Tokens<'_>) -> Vec<String> {
    let mut path = Vec::new();
    while let Some(word) = tokens.next_if(|token| is_word(token)) {
        path.push(word.clone());
        if tokens.next_if(|token| *token == "::").is_none() {
            break;
        }
    }
    path
}

fn is_word(token: &str) -> bool {
    token.starts_with(|first: char| first.is_alphanumeric() || first == '_')
}

/// Words, `::` and other characters.
fn tokens(code: &str) -> Vec<String> {
    let mut tokens: Vec<String> = Vec::new();
    let mut is_in_word = false;
    for c in code.chars() {
        let is_part = c.is_alphanumeric() || c == '_';
        match tokens.last_mut() {
            Some(last) if is_part && is_in_word || c == ':' && last == ":" => last.push(c),
            _ if !c.is_whitespace() => tokens.push(c.to_string()),
            _ => {}
        }
        is_in_word = is_part;
    }
    tokens
}

/// The code without comments and what only tests have. It is formatted: an item ends with a line
/// that closes it at its own depth.
fn code(text: &str) -> String {
    let mut code = String::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        let depth = line.len() - line.trim_start().len();
        if !line.trim_start().starts_with("#[cfg(test)]") {
            code.push_str(line.split("//").next().unwrap_or_default());
            code.push('\n');
            continue;
        }
        let ends = |line: &&str| {
            let is_inside = line.len() - line.trim_start().len() > depth;
            let is_closed = line.ends_with(['}', ';', ',']) && !line.trim_start().starts_with("#[");
            !is_inside && is_closed
        };
        lines.by_ref().find(ends);
    }
    code
}

/// The sets of modules that use each other, be it by way of others.
fn in_circles(graph: &Graph) -> Vec<BTreeSet<&Module>> {
    let reached = |from: &Module| {
        let mut reached = BTreeSet::new();
        let mut next: Vec<&Module> = graph.get(from).into_iter().flatten().collect();
        while let Some(module) = next.pop() {
            if reached.insert(module) {
                next.extend(graph.get(module).into_iter().flatten());
            }
        }
        reached
    };
    let reached: BTreeMap<&Module, BTreeSet<&Module>> =
        graph.keys().map(|module| (module, reached(module))).collect();
    let both = |one: &Module, other: &Module| {
        let is = |one, other| reached.get(one).is_some_and(|its| its.contains(other));
        is(one, other) && is(other, one)
    };
    let circle = |one| graph.keys().filter(|other| both(one, other)).collect::<BTreeSet<_>>();
    let circles: BTreeSet<_> = graph.keys().map(circle).filter(|it| !it.is_empty()).collect();
    circles.into_iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(files: &[(&str, &str)]) -> Vec<String> {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join("crates/a/src").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        circles(root.path()).unwrap()
    }

    #[test]
    fn files_that_use_each_other_are_named() {
        let lib = ("lib.rs", "mod one;\nmod two;\n");
        let found_with = |one: &str, two: &str| found(&[lib, ("one.rs", one), ("two.rs", two)]);
        let uses_two = "use std::{io, fmt};\nuse crate::{two::{self, X as Y}};\n";
        assert_eq!(found_with(uses_two, "pub struct X;\n"), [""; 0]);
        assert_eq!(found_with(uses_two, "fn f() { super::one::g() }\n"), ["a: one, two"]);
        let test = "#[cfg(test)]\nmod tests {\n    use crate::one;\n}\n// crate::one::g\n";
        assert_eq!(found_with(uses_two, test), [""; 0]);
    }

    #[test]
    fn a_child_that_uses_its_parent_is_in_a_circle_where_the_parent_uses_it() {
        let child = ("one/two.rs", "use super::T;\n");
        let parent = |text| ("one.rs", text);
        let lib = ("lib.rs", "mod one;\n");
        assert_eq!(found(&[lib, parent("mod two;\nstruct T;\n"), child]), [""; 0]);
        let both = parent("mod two;\nuse two::f;\nstruct T;\n");
        assert_eq!(found(&[lib, both, child]), ["a: one, one::two"]);
    }

    #[test]
    fn this_project_keeps_the_rule() {
        assert_eq!(circles(crate::project::root()).unwrap(), [""; 0]);
    }
}
