// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Load order of kernel modules, from depmod's `modules.dep`.

use std::path::PathBuf;

use anyhow::{Context as _, Result};

/// The files of `wanted` modules and of all they need, in loading order, relative to the folder of
/// `modules.dep`. Modules that are built into the kernel do not occur there and must not be wanted.
pub(crate) fn order(dependencies: &str, wanted: &[&str]) -> Result<Vec<PathBuf>> {
    let mut files: Vec<PathBuf> = Vec::new();
    for module in wanted {
        let (file, needs) = dependencies
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(file, _)| name(file) == name(module))
            .with_context(|| format!("the kernel has no module {module}"))?;
        // depmod lists what must be loaded first last.
        for file in needs.split_ascii_whitespace().rev().chain([file]) {
            let file = PathBuf::from(file);
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    Ok(files)
}

/// A module's name from its file's: the kernel takes `-` and `_` for the same.
fn name(path: &str) -> String {
    let file = path.rsplit('/').next().unwrap_or(path);
    file.split('.').next().unwrap_or(file).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEPENDENCIES: &str = "\
kernel/arch/x86/kvm/kvm.ko: kernel/virt/lib/irqbypass.ko
kernel/arch/x86/kvm/kvm-amd.ko: kernel/arch/x86/kvm/kvm.ko kernel/virt/lib/irqbypass.ko
kernel/virt/lib/irqbypass.ko:
";

    #[test]
    fn what_is_needed_comes_first_and_once() {
        let order = order(DEPENDENCIES, &["kvm_amd", "kvm"]).unwrap();
        let names: Vec<_> = order.iter().map(|path| name(path.to_str().unwrap())).collect();
        assert_eq!(names, ["irqbypass", "kvm", "kvm_amd"]);
    }

    #[test]
    fn a_missing_module_is_an_error() {
        assert!(order(DEPENDENCIES, &["virtio"]).is_err());
    }
}
