// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which VMM a process is: by its names, or by what it says and what the kernel shows of it.

use super::command_line::{Vmm, has_qemus_options};
use super::process::{Process, ProcessError};

/// What the kernel calls a VM of KVM's among a process's files, and a file of QEMU's memory backends among its mappings.
const KVM_VM: &str = "anon_inode:kvm-vm";
const BACKEND: &str = "/memfd:memory-backend-memfd";

/// Which VMM a process is. One that is not called like any must have QEMU's options, and a VM of KVM's or QEMU's memory.
///
/// # Errors
/// [`ProcessError`].
pub(crate) fn recognise(
    process: &Process,
    program: &str,
    arguments: &[String],
) -> Result<Option<Vmm>, ProcessError> {
    let by_name = Vmm::recognise(program, arguments);
    if by_name.is_some() || !has_qemus_options(arguments) {
        return Ok(by_name);
    }
    let has_vm = process.find_link(|link| link == KVM_VM)?.is_some();
    let has_backend = || Ok(process.mappings()?.iter().any(|mapping| mapping.path.starts_with(BACKEND)));
    Ok((has_vm || has_backend()?).then_some(Vmm::Qemu))
}
