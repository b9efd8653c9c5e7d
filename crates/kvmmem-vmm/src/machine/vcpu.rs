// SPDX-License-Identifier: Apache-2.0 OR MIT
//! vCPU: its initial state, and the thread that runs it and handles its exits.

mod again;
mod error;
mod internal_error;

use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_bindings::{
    KVM_SYSTEM_EVENT_CRASH, KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, Msrs, kvm_msr_entry,
    kvm_regs,
};
use kvm_ioctls::{VcpuExit, VcpuFd};
use kvmmem_abi::cpuid::DOORBELL_PORT;
use kvmmem_sys::pio::PortData;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::limit::warn_limited;
use crate::machine::boot::{STACK_TOP, boot_sregs};
use crate::machine::cpuid::CpuidTemplate;
use crate::machine::devices::bus::Bus;
use crate::machine::introspector::{IntrospectorExits, Served};
use crate::machine::registers;
use crate::machine::rendezvous::Rendezvous;
use crate::machine::stop::{GenerationEnd, StopHandle};
use again::execute_again;
pub use error::VcpuError;
use internal_error::FalseDeliveries;
pub use internal_error::KvmFault;

/// Where the boot CPU starts.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BootState {
    /// First instruction.
    pub(crate) entry: u64,
    /// GPA of the boot parameters.
    pub(crate) params: u64,
}

/// Sets up vCPU `id`. Only the boot CPU, which has a `boot` state, runs at once; the others wait
/// for INIT and SIPI.
pub(crate) fn set_up(
    vcpu: &VcpuFd,
    id: u8,
    cpuid: &CpuidTemplate,
    boot: Option<BootState>,
) -> Result<(), VcpuError> {
    let failed = |what| move |source| VcpuError::Setup { id, what, source };
    let table = cpuid.for_cpu(id).map_err(|source| VcpuError::Cpuid { id, source })?;
    vcpu.set_cpuid2(&table).map_err(failed("the CPUID table"))?;
    if let Some(boot) = boot {
        set_msrs(vcpu, id)?;
        let sregs = vcpu.get_sregs().map_err(failed("the system registers"))?;
        vcpu.set_sregs(&boot_sregs(sregs)).map_err(failed("the system registers"))?;
        const RESERVED_FLAG: u64 = 1 << 1;
        let regs = kvm_regs {
            rip: boot.entry,
            rsi: boot.params,
            rsp: STACK_TOP,
            rflags: RESERVED_FLAG,
            ..Default::default()
        };
        vcpu.set_regs(&regs).map_err(failed("the registers"))?;
    }
    Ok(())
}

/// What firmware would have set: write-back memory by default, fast strings on.
fn set_msrs(vcpu: &VcpuFd, id: u8) -> Result<(), VcpuError> {
    const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
    const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;
    const MSR_MISC_ENABLE: u32 = 0x1a0;
    const FAST_STRINGS: u64 = 1;
    for (index, data) in
        [(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK), (MSR_MISC_ENABLE, FAST_STRINGS)]
    {
        let entry = kvm_msr_entry { index, data, ..Default::default() };
        let failed = |source| VcpuError::Setup { id, what: "a model-specific register", source };
        let msrs = Msrs::from_entries(&[entry])
            .map_err(|_| failed(kvm_ioctls::Error::new(libc::E2BIG)))?;
        // KVM takes as many as it knows; a CPU without one of these is as good.
        vcpu.set_msrs(&msrs).map_err(failed)?;
    }
    Ok(())
}

/// What the vCPUs of one generation share.
pub(crate) struct Shared {
    pub(crate) ports: Bus,
    pub(crate) mmio: Bus,
    /// Present in an introspector.
    pub(crate) introspector: Option<Arc<dyn IntrospectorExits>>,
    pub(crate) rendezvous: Arc<Rendezvous>,
    pub(crate) stop: StopHandle,
}

impl Shared {
    /// Takes a guest's write to where no memory takes one.
    fn write_mmio(&self, gpa: u64, data: &[u8]) {
        let is_refused =
            self.introspector.as_ref().is_some_and(|introspector| introspector.refuse_write(gpa));
        if !is_refused {
            self.mmio.write(gpa, data);
        }
    }
}

/// Ends the machine when its thread does, however that came.
struct LastWords<'a> {
    id: u8,
    stop: &'a StopHandle,
}

impl Drop for LastWords<'_> {
    fn drop(&mut self) {
        // A thread that ends in order has a reason, and the first one counts.
        if !self.stop.is_ending() {
            let error = VcpuError::Exit { id: self.id, exit: "its thread panicked".into() };
            self.stop.end(GenerationEnd::Failed(error.into()));
        }
    }
}

/// A running vCPU thread.
pub(crate) struct VcpuThread(Arc<JoinHandle<()>>);

impl VcpuThread {
    /// Starts the thread of vCPU `id`, which [`Rendezvous::kick`] makes leave the guest.
    pub(crate) fn start(id: u8, mut vcpu: VcpuFd, shared: Arc<Shared>) -> Result<Self, VcpuError> {
        let rendezvous = shared.rendezvous.clone();
        let run = move || {
            let _last_words = LastWords { id, stop: &shared.stop };
            if let Err(error) = run(id, &mut vcpu, &shared) {
                shared.stop.end(GenerationEnd::Failed(error.into()));
            }
        };
        let thread = std::thread::Builder::new().name(format!("vcpu{id}")).spawn(run);
        let thread = Arc::new(thread.map_err(|source| VcpuError::Thread { id, source })?);
        let kicked = thread.clone();
        rendezvous.add_kick(move || {
            let _ = kicked.kill(kick_signal());
        });
        Ok(Self(thread))
    }

    /// Whether the thread is gone.
    pub(crate) fn is_finished(&self) -> bool {
        self.0.is_finished()
    }
}

/// The signal that interrupts `KVM_RUN`.
fn kick_signal() -> i32 {
    SIGRTMIN()
}

/// Makes the kick signal interrupt system calls instead of ending the process.
///
/// # Errors
/// What the kernel reports.
pub(crate) fn install_kick_handler() -> io::Result<()> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(kick_signal(), ignore).map_err(io::Error::from)
}

/// Runs the guest until the generation ends.
fn run(id: u8, vcpu: &mut VcpuFd, shared: &Shared) -> Result<(), VcpuError> {
    let data = PortData::map(vcpu).map_err(|source| VcpuError::PortData { id, source })?;
    let mut row = FalseDeliveries::default();
    while !shared.stop.is_ending() {
        run_once(id, vcpu, &data, shared, &mut row)?;
    }
    Ok(())
}

/// One entry into the guest and the exit from it.
fn run_once(
    id: u8,
    vcpu: &mut VcpuFd,
    data: &PortData,
    shared: &Shared,
    row: &mut FalseDeliveries,
) -> Result<(), VcpuError> {
    let failed = |source| VcpuError::Registers { id, source };
    let inside = shared.rendezvous.enter(id, || registers::read(vcpu).ok());
    // What ends the machine may be that memory could not be taken from a paused guest.
    if shared.stop.is_ending() {
        return Ok(());
    }
    let exit = vcpu.run();
    drop(inside);
    if !matches!(exit, Ok(VcpuExit::InternalError | VcpuExit::Intr) | Err(_)) {
        row.reset();
    }
    let mut served = Served::No;
    match exit {
        Ok(VcpuExit::IoIn(DOORBELL_PORT, answer)) => {
            answer.fill(0xff);
            if let (4, Some(introspector)) = (answer.len(), &shared.introspector) {
                served = introspector.doorbell(id, vcpu, data).map_err(failed)?;
            }
        }
        Ok(VcpuExit::IoIn(port, data)) => shared.ports.read(port.into(), data),
        Ok(VcpuExit::IoOut(port, data)) => shared.ports.write(port.into(), data),
        Ok(VcpuExit::MmioRead(gpa, data)) => shared.mmio.read(gpa, data),
        Ok(VcpuExit::MmioWrite(gpa, data)) => shared.write_mmio(gpa, data),
        Ok(VcpuExit::Unsupported(reason)) => {
            if let (kvmmem_sys::xen::EXIT_REASON, Some(introspector)) =
                (reason, &shared.introspector)
            {
                served = introspector.hypercall(id, vcpu).map_err(failed)?;
            }
            if matches!(served, Served::No) {
                return Err(VcpuError::Exit { id, exit: format!("unknown exit reason {reason}") });
            }
        }
        Ok(VcpuExit::Shutdown) => shared.stop.end(GenerationEnd::TripleFault),
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
            shared.stop.end(GenerationEnd::PowerOff)
        }
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => {
            shared.stop.end(GenerationEnd::Reset)
        }
        Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_CRASH, _)) => {
            shared.stop.end(GenerationEnd::TripleFault)
        }
        Ok(VcpuExit::Intr | VcpuExit::IrqWindowOpen) => {}
        Ok(VcpuExit::InternalError) => {
            let fault = read_fault(vcpu).map_err(failed)?;
            if !row.allow(&fault) {
                return Err(VcpuError::InternalError { id, fault });
            }
            warn_limited!(id, %fault, "KVM saw the delivery of an event and there is none: executing the instruction again");
        }
        Ok(exit) => return Err(VcpuError::Exit { id, exit: format!("{exit:?}") }),
        // A signal, or a vCPU that waits for its SIPI: look whether the generation ends.
        Err(error) if matches!(error.errno(), libc::EINTR | libc::EAGAIN) => {}
        Err(source) => {
            warn_limited!(id, %source, "KVM_RUN failed");
            return Err(VcpuError::Run { id, source });
        }
    }
    if let Served::Again(regs) = served {
        // KVM completes the exit, which may write to the guest's memory.
        let _inside = shared.rendezvous.enter(id, || registers::read(vcpu).ok());
        if !shared.stop.is_ending() {
            execute_again(vcpu, &regs).map_err(failed)?;
        }
    }
    Ok(())
}

/// The internal error of KVM that the last exit of `vcpu` was.
fn read_fault(vcpu: &mut VcpuFd) -> Result<KvmFault, kvm_ioctls::Error> {
    let error =
        kvmmem_sys::internal_error::last(vcpu).ok_or_else(|| kvm_ioctls::Error::new(libc::EIO))?;
    Ok(KvmFault::new(error, vcpu.get_regs()?.rip, &vcpu.get_vcpu_events()?))
}
