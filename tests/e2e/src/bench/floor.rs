// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The floor of map + touch + unmap: what no implementation on this host can avoid. A bare guest
//! calls its VMM, which maps a foreign page; the guest touches it; the guest calls again and the
//! VMM maps its own page back. Nothing is checked, looked up or pinned.

use std::time::Instant;

use anyhow::{Context, Result, bail};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use kvmmem_sys::ram::GuestRam;
use kvmmem_sys::xen;

/// Where the guest's code is.
const CODE: u64 = 0x1000;
/// The page that is replaced.
const PAGE: u64 = 0x8000;
/// Any port that no device of the bare guest has.
const PORT: u16 = 0x0d00;

/// `times` cycles, each in nanoseconds.
pub(crate) fn cycles(times: usize) -> Result<Vec<u64>> {
    let kvm = Kvm::new().context("cannot open /dev/kvm")?;
    let vm = kvm.create_vm().context("cannot create a VM")?;
    let (ram, foreign) = (GuestRam::new(1 << 20)?, GuestRam::new(1 << 20)?);
    ram.attach(&vm)?;
    let by_hypercall = xen::can_intercept(&kvm);
    if by_hypercall {
        xen::intercept_hypercalls(&vm).context("cannot intercept hypercalls")?;
    }
    let call: &[u8] = match (by_hypercall, is_amd()?) {
        (true, true) => &[0x0f, 0x01, 0xd9],  // vmmcall
        (true, false) => &[0x0f, 0x01, 0xc1], // vmcall
        (false, _) => &[0x66, 0xed],          // in eax, dx
    };
    // Real mode: call; mov al, [PAGE]; call; jmp CODE
    let mut code = call.to_vec();
    code.extend([0xa0, 0x00, 0x80]);
    code.extend(call);
    let back = i8::try_from(code.len() + 2).context("the code is too long")?.wrapping_neg();
    code.extend([0xeb, back.cast_unsigned()]);
    write(&ram, CODE, &code)?;

    let mut vcpu = vm.create_vcpu(0).context("cannot create a vCPU")?;
    let mut sregs = vcpu.get_sregs().context("cannot read registers")?;
    (sregs.cs.base, sregs.cs.selector) = (0, 0);
    vcpu.set_sregs(&sregs).context("cannot set registers")?;
    let mut regs = vcpu.get_regs().context("cannot read registers")?;
    (regs.rip, regs.rflags, regs.rdx, regs.rax) = (CODE, 2, u64::from(PORT), 32);
    vcpu.set_regs(&regs).context("cannot set registers")?;

    let mut nanos = Vec::with_capacity(times);
    next_call(&mut vcpu, by_hypercall)?;
    for _ in 0..times {
        let start = Instant::now();
        ram.replace_page(PAGE, foreign.fd(), PAGE)?;
        next_call(&mut vcpu, by_hypercall)?;
        ram.restore_page(PAGE)?;
        next_call(&mut vcpu, by_hypercall)?;
        nanos.push(u64::try_from(start.elapsed().as_nanos())?);
    }
    Ok(nanos)
}

/// Runs the guest to its next call, whose result is 0.
fn next_call(vcpu: &mut VcpuFd, by_hypercall: bool) -> Result<()> {
    match vcpu.run().context("cannot run the bare guest")? {
        VcpuExit::Unsupported(xen::EXIT_REASON) if by_hypercall => xen::set_result(vcpu, 0),
        VcpuExit::IoIn(PORT, answer) if !by_hypercall => answer.fill(0),
        exit => bail!("the bare guest stopped at {exit:?}"),
    }
    Ok(())
}

fn write(ram: &GuestRam, gpa: u64, bytes: &[u8]) -> Result<()> {
    let written =
        rustix::io::pwrite(ram.fd(), bytes, gpa).context("cannot write the bare guest's code")?;
    anyhow::ensure!(written == bytes.len(), "short write");
    Ok(())
}

fn is_amd() -> Result<bool> {
    Ok(std::fs::read_to_string("/proc/cpuinfo")
        .context("cannot read /proc/cpuinfo")?
        .contains(" svm"))
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_bare_guest_goes_round() {
        if !std::path::Path::new("/dev/kvm").exists() {
            eprintln!("skipped: /dev/kvm cannot be opened: run on a host with KVM");
            return;
        }
        assert_eq!(super::cycles(3).unwrap().len(), 3);
    }
}
