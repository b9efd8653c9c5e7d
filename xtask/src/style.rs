// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Suite `style`: formatting, lints, documentation and the project's own rules.
//!
//! `cargo xtask check` runs [`formatting`] and [`rules`] too, and lints only what changed.

use anyhow::{Result, bail};

use crate::cache::Cache;
use crate::suite::Suite;
use crate::tool::Tool;
use crate::{
    crate_graph, deny, doc_check, file_graph, module_format, project, prose_check, public_items,
    source_check, ui,
};

/// Cargo's arguments for fuzz/, which is a workspace of its own.
const FUZZ: [&str; 2] = ["--manifest-path", "fuzz/Cargo.toml"];

/// Runs all of it.
pub(crate) fn run(cache: &Cache, suite: &mut Suite) -> Result<()> {
    formatting(cache, suite)?;
    let lints = ["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"];
    suite.check("clippy", cargo(cache, "clippy", &lints)?);
    let lints =
        ["--no-default-features", "--target-dir", "target", "--quiet", "--", "-D", "warnings"];
    let fuzz = cargo(cache, "clippy of fuzz", &[&["clippy"], &FUZZ[..], &lints].concat())?;
    suite.check("clippy of fuzz", fuzz);
    suite.check("doc", documentation(cache)?);
    rules(cache, suite)?;
    deny::check(cache, suite)
}

/// rustfmt, for each of the three styles of code.
pub(crate) fn formatting(cache: &Cache, suite: &mut Suite) -> Result<()> {
    suite.check("fmt", cargo(cache, "fmt", &["fmt", "--all", "--check"])?);
    let fuzz = cargo(cache, "fmt of fuzz", &[&["fmt"], &FUZZ[..], &["--check"]].concat())?;
    suite.check("fmt of fuzz", fuzz);
    suite.check("fmt of the module", module_format::check(&project::root().join("kernel")));
    Ok(())
}

/// Where `unsafe` may be, which crate may depend on which, and what the documentation links to.
pub(crate) fn rules(cache: &Cache, suite: &mut Suite) -> Result<()> {
    let places = source_check::unsafe_code(project::root());
    suite.check(
        "unsafe code is where it may be",
        none(places, "unsafe code outside of crates/kvmmem-sys and kernel/sys"),
    );
    let dependencies = crate_graph::forbidden(&cache.fresh_log("crate-graph")?);
    suite.check(
        "no tool links the broker",
        none(dependencies, "dependencies that xtask/src/crate_graph.rs does not allow"),
    );
    let circles = file_graph::circles(project::root());
    suite
        .check("files use each other in one direction", none(circles, "files that use each other"));
    let items = public_items::too_many(project::root());
    suite.check("the broker's public face is small", none(items, "public items"));
    let mistakes = doc_check::mistakes(project::root());
    suite.check("the documentation is in order", none(mistakes, "in the documentation"));
    let mistakes = prose_check::mistakes(project::root());
    suite.check("comments name who acts", none(mistakes, "words to avoid in comments"));
    Ok(())
}

/// rustdoc without warnings: no broken link, no page that two crates claim.
fn documentation(cache: &Cache) -> Result<Result<()>> {
    let log = cache.fresh_log("doc")?;
    Ok(ui::step("doc", || {
        Tool::new(project::cargo(), &log)
            .args(["doc", "--workspace", "--no-deps", "--quiet"])
            .env("RUSTDOCFLAGS", "-D warnings")
            .dir(project::root())
            .run()
    }))
}

/// Runs cargo in the checkout; the outer error is one of the log.
pub(crate) fn cargo(cache: &Cache, name: &str, args: &[&str]) -> Result<Result<()>> {
    let log = cache.fresh_log(&name.replace(' ', "-"))?;
    Ok(ui::step(name, || Tool::new(project::cargo(), &log).args(args).dir(project::root()).run()))
}

/// Fails with a list of what was found.
fn none(found: Result<Vec<String>>, what: &str) -> Result<()> {
    let found = found?;
    if found.is_empty() {
        return Ok(());
    }
    bail!("{what}:\n  {}", found.join("\n  "))
}
