// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The modules of two places: the list of modules, which /proc/modules and lsmod show, and the set
//! of kernel objects that is /sys/module.

use std::collections::BTreeMap;

use super::finding::{Finding, Report};
use crate::bytes::Bytes;
use crate::kernel::{Kernel, KernelError};
use crate::modules::{Module, Modules, Reader};

/// The symbol of the list.
pub(super) const LIST: &str = "modules";

/// The places, as a finding names them.
const IN_LIST: &str = "the list of modules";
const IN_SYSFS: &str = "/sys/module";

/// Bytes of a module's name (`MODULE_NAME_LEN`).
const NAME_LEN: u64 = 56;

/// The state of a module that is not complete yet, and that only the list has.
const UNFORMED: u32 = 3;

/// The most modules.
const MAX_MODULES: usize = 1 << 16;

/// The most modules that are looked at for the name of one.
const MAX_NAMED: usize = 4096;

pub(super) fn check(kernel: &Kernel<'_>) -> Result<Report, KernelError> {
    let state = kernel.offset("module", "state")?;
    let mut listed = BTreeMap::new();
    for module in kernel.list_of(kernel.symbol(LIST)?, "module", "list")? {
        let module = module?;
        if kernel.read_u32(module.wrapping_add(state))? != UNFORMED {
            add(kernel, &mut listed, module)?;
        }
    }
    let in_sysfs = in_sysfs(kernel)?;
    let mut report = Report { examined: listed.len().max(in_sysfs.len()), findings: Vec::new() };
    report.findings.extend(missing(&in_sysfs, &listed, IN_SYSFS, IN_LIST));
    report.findings.extend(missing(&listed, &in_sysfs, IN_LIST, IN_SYSFS));
    Ok(report)
}

/// Names of the modules of /sys/module by their addresses.
pub(super) fn in_sysfs(kernel: &Kernel<'_>) -> Result<BTreeMap<u64, String>, KernelError> {
    let (kobject, owner) =
        (kernel.offset("module_kobject", "kobj")?, kernel.offset("module_kobject", "mod")?);
    let kset = kernel.read_u64(kernel.symbol("module_kset")?)?;
    let head = kset.wrapping_add(kernel.offset("kset", "list")?);
    let mut in_sysfs = BTreeMap::new();
    for (count, object) in kernel.list_of(head, "kobject", "entry")?.enumerate() {
        let module = kernel.read_u64(object?.wrapping_sub(kobject).wrapping_add(owner))?;
        // What is built in has parameters there, and no module.
        if module != 0 {
            add(kernel, &mut in_sysfs, module)?;
        }
        if count > MAX_MODULES {
            return Err(too_many(head));
        }
    }
    Ok(in_sysfs)
}

fn add(
    kernel: &Kernel<'_>,
    modules: &mut BTreeMap<u64, String>,
    module: u64,
) -> Result<(), KernelError> {
    let mut name = Bytes::zeroed(NAME_LEN);
    kernel.read(module.wrapping_add(kernel.offset("module", "name")?), name.as_mut())?;
    modules.insert(module, name.string(0, NAME_LEN));
    if modules.len() > MAX_MODULES { Err(too_many(module)) } else { Ok(()) }
}

/// Those of one place that the other has not.
fn missing(
    one: &BTreeMap<u64, String>,
    other: &BTreeMap<u64, String>,
    found: &'static str,
    missing: &'static str,
) -> Vec<Finding> {
    let only = one.iter().filter(|(gva, _)| !other.contains_key(gva));
    only.map(|(gva, name)| Finding::Hidden {
        name: format!("module {name}"),
        gva: *gva,
        found,
        missing,
    })
    .collect()
}

fn too_many(gva: u64) -> KernelError {
    KernelError::Malformed { what: "more than 65,536 modules".to_owned(), gva }
}

/// The modules, those among them that only /sys/module has, as far as they can be read: they are
/// for names alone.
pub(super) fn all(kernel: &Kernel<'_>) -> Vec<Module> {
    let Ok(listed) = Modules::new(kernel) else { return Vec::new() };
    let mut modules: Vec<_> = listed.filter_map(Result::ok).take(MAX_NAMED).collect();
    if let (Ok(reader), Ok(in_sysfs)) = (Reader::new(kernel), in_sysfs(kernel)) {
        let more =
            in_sysfs.into_keys().filter(|gva| modules.iter().all(|module| module.gva != *gva));
        let more: Vec<_> =
            more.take(MAX_NAMED).filter_map(|gva| reader.module(gva).ok()?).collect();
        modules.extend(more);
    }
    modules
}
