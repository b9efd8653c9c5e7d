// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Which VMM a process is: by its names, or by what it says and what the kernel shows of it.

use super::process::{Process, ProcessError};
use super::vmm::{Vmm, has_qemus_options};

/// What the kernel calls a VM of KVM's among a process's files, and a file of QEMU's memory
/// backends among its mappings.
const KVM_VM: &str = "anon_inode:kvm-vm";
const BACKEND: &str = "/memfd:memory-backend-memfd";

/// Which VMM a process is; `None` for a set-user-ID program. One that has the name of no known VMM
/// must have QEMU's options, and a VM of KVM's or QEMU's memory.
pub fn recognise(
    process: &Process,
    program: &str,
    arguments: &[String],
) -> Result<Option<Vmm>, ProcessError> {
    // Its arguments and files are those of a user who may not have its memory.
    match process.is_set_id() {
        Ok(false) => {}
        Ok(true) => return Ok(None),
        // A broker that may not read what it runs gets no memory of it either.
        Err(ProcessError::Denied(_)) => {}
        Err(error) => return Err(error),
    }
    let by_name = Vmm::recognise(program, arguments);
    if by_name.is_some() || !has_qemus_options(arguments) {
        return Ok(by_name);
    }
    let has_vm = process.find_link(|link| link == KVM_VM)?.is_some();
    let has_backend =
        || Ok(process.mappings()?.iter().any(|mapping| mapping.path.starts_with(BACKEND)));
    Ok((has_vm || has_backend()?).then_some(Vmm::Qemu))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::process::CommandExt;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn a_program_with_other_rights_is_no_vmm_whatever_it_is_called() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("program");
        // By another process: no thread of this one has the copy open for writing while it is
        // executed.
        assert!(Command::new("cp").arg("/bin/cat").arg(&path).status().unwrap().success());
        for (mode, expected) in [("0755", Some(Vmm::Qemu)), ("4755", None), ("2755", None)] {
            assert!(Command::new("chmod").arg(mode).arg(&path).status().unwrap().success());
            let mut command = Command::new(&path);
            command.arg0("qemu-system-x86_64").stdin(Stdio::piped()).stdout(Stdio::piped());
            let mut child = command.spawn().unwrap();
            // The kernel lets this process go on before the other one has its arguments.
            child.stdin.as_mut().unwrap().write_all(b"x").unwrap();
            child.stdout.as_mut().unwrap().read_exact(&mut [0]).unwrap();
            let process = Process::open(child.id()).unwrap();
            let (program, arguments) = (process.program().unwrap(), process.arguments().unwrap());
            let found = recognise(&process, &program, &arguments).unwrap();
            drop(child.stdin.take());
            assert!(child.wait().unwrap().success());
            assert_eq!(found, expected, "mode {mode}");
        }
    }
}
