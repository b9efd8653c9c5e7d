// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The address space that a vCPU of the target uses, from its registers: those that the VMM shows,
//! or those in a dump file.

use anyhow::{Context, Result, bail};
use kvmmem_client::admin::VcpuRegisters;
use kvmmem_memory::paging::{AddressSpace, ControlRegisters};

use crate::escape::escape;

/// Where registers can be had, and what to do elsewhere.
pub(crate) const NO_REGISTERS: &str = "--vcpu needs the vCPUs' registers, which come with --target NAME on the host and are in \
     ELF dumps (kvmmem dump --format elf --target NAME); elsewhere give the page tables: --cr3 CR3, --cr3 kernel, or --pid PID";

/// The address space of vCPU `number`.
pub(crate) fn space(vcpus: &[ControlRegisters], number: u32) -> Result<AddressSpace> {
    let vcpu = usize::try_from(number).ok().and_then(|index| vcpus.get(index));
    let Some(vcpu) = vcpu else {
        match vcpus.len() {
            0 => bail!(NO_REGISTERS),
            1 => bail!("there is no vCPU {number}: the only one is 0"),
            count => bail!("there is no vCPU {number}: the last one is {}", count - 1),
        }
    };
    vcpu.space()
        .with_context(|| format!("vCPU {number} has no page tables to look addresses up in"))
}

/// The registers of a running target that define an address space.
pub(crate) fn control(registers: &VcpuRegisters) -> ControlRegisters {
    let VcpuRegisters { cr0, cr3, cr4, efer, .. } = *registers;
    ControlRegisters { cr0, cr3, cr4, efer }
}

/// The dump file has no registers.
pub(crate) fn none_in(file: &std::path::Path) -> anyhow::Error {
    anyhow::anyhow!("{} has no registers: {NO_REGISTERS}", escape(&file.to_string_lossy()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vcpu_that_is_not_there_is_named_with_those_that_are() {
        let vcpu = ControlRegisters { cr0: 1 << 31, cr3: 0x1000, cr4: 1 << 5, efer: None };
        assert_eq!(space(&[vcpu; 2], 1).unwrap().cr3, 0x1000);
        let error =
            |vcpus: &[ControlRegisters], number| space(vcpus, number).unwrap_err().to_string();
        assert_eq!(error(&[vcpu], 1), "there is no vCPU 1: the only one is 0");
        assert_eq!(error(&[vcpu; 4], u32::MAX), "there is no vCPU 4294967295: the last one is 3");
        let off = ControlRegisters { cr0: 0, ..vcpu };
        let error = format!("{:#}", space(&[off], 0).unwrap_err());
        assert!(error.contains("vCPU 0") && error.contains("paging is off"), "{error}");
    }
}
