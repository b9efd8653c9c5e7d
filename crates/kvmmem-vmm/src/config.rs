// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Configuration of a virtual machine, which [`crate::run`] takes.

use std::path::PathBuf;

/// Everything [`crate::run`] needs to know about one virtual machine.
#[derive(Clone, Debug)]
pub struct VmConfig {
    /// Kernel image: a bzImage or a 64-bit ELF file (vmlinux).
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// Size of the guest's RAM in bytes; a multiple of 4096.
    pub memory_bytes: u64,
    /// Number of vCPUs, from 1 to [`MAX_VCPUS`].
    pub vcpus: u8,
    /// Disks, in the order of their names in the guest (`vda`, `vdb`, ...).
    pub disks: Vec<DiskConfig>,
    /// CID of the guest's vsock device; no device without one.
    pub cid: Option<u32>,
    /// Where the serial port leads.
    pub serial: SerialConfig,
    /// Name, as the broker's clients see it.
    pub name: String,
    /// UUID, as the broker's clients see it.
    pub uuid: [u8; 16],
    /// Socket of the broker.
    pub broker: Option<PathBuf>,
    /// Whether the broker may hand this machine's memory to introspectors.
    pub introspectable: bool,
    /// Whether this machine may map others' memory: it gets the CPUID leaves and the hypercalls.
    pub introspector: bool,
    /// How an introspector's hypercalls reach the VMM.
    pub hypercalls: HypercallMethod,
    /// Whether an introspector gets windows, where the host's KVM has read-only memory slots:
    /// views by hypercall, beside single pages.
    pub window: bool,
    /// What a reset by the guest does.
    pub reset: ResetPolicy,
    /// Whether the process gives up all rights that the machine does not need, for good: the
    /// calling thread, all threads that it starts, and, as to system calls, all threads there
    /// are.
    pub sandbox: bool,
}

/// The most vCPUs a machine can have: APIC ids stay below 255 and one byte wide.
pub const MAX_VCPUS: u8 = 64;

/// The most disks a machine can have; each takes one of the I/O APIC's pins 16 to 22.
pub const MAX_DISKS: usize = 7;

/// One virtio-blk disk.
#[derive(Clone, Debug)]
pub struct DiskConfig {
    /// The image: a file or a block device, raw.
    pub path: PathBuf,
    /// Refuses writes; the file is opened for reading alone.
    pub read_only: bool,
}

/// Where the first serial port (`ttyS0`) leads.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SerialConfig {
    /// Standard output and input. A terminal is put in raw mode: Ctrl-C goes to the guest, and
    /// Ctrl-A x ends the machine, Ctrl-A Ctrl-A sends one Ctrl-A.
    Stdio,
    /// Output to a file, which is created or emptied; no input.
    File(PathBuf),
    /// Output is dropped; no input.
    None,
}

/// How hypercalls reach the VMM (see `kvmmem_abi::hypercall`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HypercallMethod {
    /// [`HypercallMethod::Xen`] where the host's KVM can, else [`HypercallMethod::Port`].
    #[default]
    Auto,
    /// `vmcall`/`vmmcall`, forwarded by `KVM_CAP_XEN_HVM` with `INTERCEPT_HCALL`.
    Xen,
    /// `in eax, dx` at the doorbell port.
    Port,
}

/// What happens when the guest resets its machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ResetPolicy {
    /// The machine starts anew: RAM zeroed, mappings undone, devices as new, kernel loaded again.
    #[default]
    Restart,
    /// [`crate::run`] returns [`crate::VmExit::Reset`].
    Exit,
}
