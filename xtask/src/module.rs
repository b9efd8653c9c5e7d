// SPDX-License-Identifier: Apache-2.0 OR MIT
//! kvmmem.ko, built against a kernel's source in the build root: as it is shipped, and for the
//! selftest.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail};

use crate::cache::{Cache, Key};
use crate::kernel::BuildTree;
use crate::tool::Tool;
use crate::{project, root, ui};

/// What the module is made of. It is copied in the checkout's layout, as its files name each other
/// by relative paths.
const SOURCES: [&str; 3] = ["kernel", "crates/kvmmem-abi", "crates/kvmmem-table"];

/// Where it is built, inside the root.
const FOLDER: &str = "/kvmmem/module";

/// Endings of what a build by hand leaves in the checkout.
const LEFTOVERS: [&str; 8] = ["o", "ko", "a", "mod", "order", "symvers", "rmeta", "cmd"];

/// Which module.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Variant {
    /// As it is shipped.
    Shipped,
    /// With what the selftest forces upon it.
    Selftest,
}

impl Variant {
    /// The value of the make variable KVMMEM_SELFTEST.
    fn switch(self) -> &'static str {
        match self {
            Self::Shipped => "n",
            Self::Selftest => "y",
        }
    }
}

/// The module for the kernel of `tree`, built if its sources have changed. The cache must be
/// locked.
pub(crate) fn make(cache: &Cache, tree: &BuildTree<'_>, variant: Variant) -> Result<PathBuf> {
    let files = sources()?;
    let mut key = Key::default();
    key.add(variant.switch());
    key.add(tree.version);
    for file in &files {
        key.add(file.as_os_str().as_encoded_bytes());
        key.add(fs::read(project::root().join(file)).with_context(|| file.display().to_string())?);
    }
    let module = cache.folder().join(format!("kvmmem-{}.ko", key.finish()));
    if module.exists() {
        return Ok(module);
    }
    let log = cache.fresh_log("module")?;
    let what = match variant {
        Variant::Shipped => "kvmmem.ko",
        Variant::Selftest => "the selftest's kvmmem.ko",
    };
    ui::step(&format!("module: {what} for {}", tree.version), || {
        let root = tree.root;
        root::remove(&root.path(FOLDER), &log)?;
        let copy = cache.scratch()?;
        for file in &files {
            let to = copy.path().join(file);
            fs::create_dir_all(to.parent().unwrap_or(&to))?;
            fs::copy(project::root().join(file), &to)
                .with_context(|| file.display().to_string())?;
        }
        Tool::as_root("cp", &log).arg("-r").arg(copy.path()).arg(root.path(FOLDER)).run()?;
        root.tool("make", &log)
            .args(["-C", tree.path, &format!("M={FOLDER}/kernel")])
            .args(tree.variables)
            .args([&format!("KVMMEM_SELFTEST={}", variant.switch()), "modules"])
            .run()?;
        let built = root.path(&format!("{FOLDER}/kernel/kvmmem.ko"));
        let bytes =
            fs::read(&built).with_context(|| format!("the build made no {}", built.display()))?;
        let forced = forced_parameters(&bytes);
        if variant == Variant::Shipped && !forced.is_empty() {
            bail!("the module as shipped has the selftest's parameters: {}", forced.join(", "));
        }
        if variant == Variant::Selftest && forced.is_empty() {
            bail!(
                "the selftest's module lacks its parameters: is KVMMEM_SELFTEST still known to kernel/Kbuild?"
            );
        }
        cache.write(&module, &bytes)
    })?;
    Ok(module)
}

/// The parameters for tests that a module has, by its `.modinfo`.
fn forced_parameters(module: &[u8]) -> Vec<String> {
    module
        .split(|byte| *byte == 0)
        .filter_map(|text| std::str::from_utf8(text).ok()?.strip_prefix("parmtype="))
        .filter(|parameter| parameter.starts_with("force_") || parameter.starts_with("test_"))
        .map(|parameter| parameter.split(':').next().unwrap_or(parameter).to_owned())
        .collect()
}

/// All source files, relative to the checkout, sorted.
fn sources() -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for folder in SOURCES {
        collect(Path::new(folder), &mut files)?;
    }
    files.sort();
    Ok(files)
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let entries =
        fs::read_dir(project::root().join(folder)).with_context(|| folder.display().to_string())?;
    for entry in entries {
        let entry = entry?;
        let path = folder.join(entry.file_name());
        let hidden = entry.file_name().as_encoded_bytes().starts_with(b".");
        let leftover = path.extension().is_some_and(|end| LEFTOVERS.iter().any(|one| end == *one));
        if hidden || leftover || path.to_string_lossy().ends_with(".mod.c") {
            continue;
        }
        if entry.file_type()?.is_dir() {
            collect(&path, files)?;
        } else {
            files.push(path);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forced_parameters_are_found() {
        let module = b"\x7fELF\0\xff\xfe\0parmtype=regions:bool\0parmtype=test_descriptor:u64\0parm=force_port:x\0parmtype=force_port:u16\0";
        assert_eq!(forced_parameters(module), ["test_descriptor", "force_port"]);
        assert!(forced_parameters(b"parmtype=max_pages_per_file:u64\0").is_empty());
    }
}
