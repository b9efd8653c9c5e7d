// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo xtask check`: format, lints and tests of what changed, to run before each commit.
//!
//! Changed packages are linted and all their tests run. Packages that depend on them are linted
//! and run the tests in their sources. It installs nothing and starts no VM; what it leaves to
//! `cargo xtask test` it prints at the end.

use std::path::PathBuf;

use anyhow::Result;

use crate::cache::Cache;
use crate::changes::{self, Changes};
use crate::suite::{self, Suite};
use crate::tool::Tool;
use crate::workspace::{Package, Workspace};
use crate::{interrupt, project, style, ui};

/// What is compared.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// Check what changed since this branch left REVISION [default: its upstream, else
    /// origin/main, else the last commit]
    #[arg(long, value_name = "REVISION")]
    since: Option<String>,
}

/// Checks; returns whether nothing failed.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let cache = Cache::open()?;
    let files = changes::files(options.since.as_deref(), &cache.fresh_log("changes")?)?;
    if files.is_empty() {
        ui::say("Nothing changed; `cargo xtask test` runs everything.");
        return Ok(true);
    }
    let workspace = Workspace::read(&cache.fresh_log("metadata")?)?;
    let changes = Changes::new(project::root(), &files, &workspace.packages);
    let mut suite = Suite::new("check");
    style::formatting(&cache, &mut suite)?;
    style::rules(&cache, &mut suite)?;
    if let Some(args) = lints(&changes) {
        let args: Vec<_> = args.iter().map(String::as_str).collect();
        suite.check("clippy", style::cargo(&cache, "clippy of what changed", &args)?);
    }
    if !changes.changed.is_empty() {
        test(&cache, &mut suite, "tests of what changed", packages(&changes.changed))?;
    }
    if let Some(args) = inner_tests(&changes, &workspace.packages) {
        test(&cache, &mut suite, "unit tests of what depends on it", args)?;
    }
    let passed = suite::summary(&[suite.finish()]);
    print!("{}", left_out(&changes, &files, &workspace.packages));
    Ok(passed && !interrupt::was_seen())
}

fn test(cache: &Cache, suite: &mut Suite, what: &str, args: Vec<String>) -> Result<()> {
    let log = cache.fresh_log(&what.replace(' ', "-"))?;
    let result = ui::step(what, || {
        Tool::new(project::cargo(), &log)
            .arg("test")
            .args(args)
            .args(["--no-fail-fast", "--", "--show-output"])
            .dir(project::root())
            .run()
    });
    suite.cargo_test(&log, result)
}

/// `-p NAME` for each.
fn packages<'a>(names: impl IntoIterator<Item = &'a &'a str>) -> Vec<String> {
    names.into_iter().flat_map(|name| ["-p".to_owned(), (*name).to_owned()]).collect()
}

/// Clippy's arguments, or none where no package is concerned.
fn lints(changes: &Changes) -> Option<Vec<String>> {
    let chosen = if changes.workspace {
        vec!["--workspace".to_owned()]
    } else {
        packages(changes.changed.union(&changes.dependants))
    };
    let words = |words: &[&str]| words.iter().map(|word| (*word).to_owned()).collect::<Vec<_>>();
    let options = words(&["--all-targets", "--quiet", "--", "-D", "warnings"]);
    (!chosen.is_empty()).then(|| [words(&["clippy"]), chosen, options].concat())
}

/// Cargo's arguments for the tests in the sources of the dependants.
fn inner_tests(changes: &Changes, all: &[Package]) -> Option<Vec<String>> {
    if changes.dependants.is_empty() {
        return None;
    }
    let has_library = all
        .iter()
        .any(|package| changes.dependants.contains(package.name.as_str()) && package.has_library());
    let mut args = packages(&changes.dependants);
    // Cargo refuses --lib where none of the packages has a library.
    args.extend(has_library.then(|| "--lib".to_owned()));
    args.push("--bins".to_owned());
    Some(args)
}

/// What was not checked, with what checks it.
fn left_out(changes: &Changes, files: &[PathBuf], all: &[Package]) -> String {
    let list = |names: &mut dyn Iterator<Item = &str>| names.collect::<Vec<_>>().join(", ");
    let mut lines = Vec::new();
    if !changes.dependants.is_empty() {
        lines.push(format!(
            "tests in tests/ of what depends on it: {}",
            list(&mut changes.dependants.iter().copied())
        ));
    }
    let mut untouched = all
        .iter()
        .map(|package| package.name.as_str())
        .filter(|name| !changes.changed.contains(name) && !changes.dependants.contains(name));
    let untouched = list(&mut untouched);
    if !untouched.is_empty() {
        lines.push(format!("other packages: {untouched}"));
    }
    if !changes.rest.is_empty() {
        let rest = changes.rest.iter().map(|path| path.display().to_string()).collect::<Vec<_>>();
        lines.push(format!("files that no package's tests read: {}", rest.join(", ")));
    }
    if files.iter().any(|file| file.starts_with("kernel")) {
        lines.push("the module: cargo xtask test --only module".to_owned());
    }
    lines.push("cargo doc, cargo deny, lints of fuzz/: cargo xtask test --only style".to_owned());
    lines.push("loom, packages and all that runs in VMs: cargo xtask test".to_owned());
    format!("not checked:\n  {}\n", lines.join("\n  "))
}
