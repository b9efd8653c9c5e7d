// SPDX-License-Identifier: Apache-2.0 OR MIT
//! `cargo deny`: checks licences, sources and advisories of dependencies by `deny.toml`.

use std::ffi::OsString;
use std::path::Path;

use anyhow::Result;

use crate::cache::Cache;
use crate::suite::Suite;
use crate::tool::{Tool, is_installed};
use crate::{project, ui};

/// The program, and the version that is installed where it is missing.
const PROGRAM: &str = "cargo-deny";
const VERSION: &str = "0.20.2";

/// Checks licences, sources and duplicates; advisories where their database can be had.
pub(crate) fn check(cache: &Cache, suite: &mut Suite) -> Result<()> {
    let program = match program(cache) {
        Ok(program) => program,
        Err(error) => {
            suite.fail("cargo deny", &error);
            return Ok(());
        }
    };
    let run = |words: &[&str], log: &Path| {
        Tool::new(&program, log).arg("--all-features").args(words).dir(project::root()).run()
    };
    let log = cache.fresh_log("deny")?;
    let what = "cargo deny check bans licenses sources";
    suite.check(what, ui::step(what, || run(&["check", "bans", "licenses", "sources"], &log)));
    let log = cache.fresh_log("advisories")?;
    if run(&["fetch", "db"], &log).is_err() {
        suite.skip(&format!(
            "advisories are not checked: the RustSec database cannot be fetched; they are where `cargo deny fetch db` \
             succeeds (its log: {})",
            log.display()
        ));
        return Ok(());
    }
    let what = "cargo deny check advisories";
    suite.check(what, ui::step(what, || run(&["check", "advisories"], &log)));
    Ok(())
}

/// The system's own, else one in the cache, which is made if it is not there.
fn program(cache: &Cache) -> Result<OsString> {
    if is_installed(PROGRAM) {
        return Ok(PROGRAM.into());
    }
    let folder = cache.folder().join(format!("{PROGRAM}-{VERSION}"));
    let program = folder.join("bin").join(PROGRAM);
    if program.is_file() {
        return Ok(program.into());
    }
    let _lock = cache.lock()?;
    // Another run may have made it meanwhile.
    if !program.is_file() {
        let log = cache.fresh_log("install-deny")?;
        ui::step(&format!("cargo install {PROGRAM}"), || {
            // Checking takes it seconds however it is built; building it for speed takes minutes.
            Tool::new(project::cargo(), &log)
                .args(["install", "--quiet", "--locked", "--debug", "--root"])
                .arg(&folder)
                .arg(format!("{PROGRAM}@{VERSION}"))
                .env("CARGO_PROFILE_DEV_DEBUG", "0")
                .run()
        })?;
    }
    Ok(program.into())
}
