// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The introspector's side: does its host offer mapping, and may this process use it?

use std::arch::x86_64::__cpuid;
use std::fs;
use std::path::Path;
use std::time::Duration;

use kvmmem::view::{GuestEndpointError, check_guest_endpoint as ask_guest_endpoint};
use kvmmem::{Device, DeviceError, device};
use kvmmem_abi::cpuid::{
    FEATURE_DOORBELL, FEATURE_VMCALL, LEAF_FEATURES, LEAF_SIGNATURE, SIGNATURE_REGISTERS,
};

use super::check::Check;
use super::{limits, views, without_module};

/// Bit of CPUID leaf 1's ecx that hypervisors set.
const HYPERVISOR_BIT: u32 = 1 << 31;

/// Whether this is a virtual machine at all.
pub(super) fn is_virtual() -> bool {
    __cpuid(1).ecx & HYPERVISOR_BIT != 0
}

/// How long the host's guest endpoint has for refusing this virtual machine.
const REFUSAL_LIMIT: Duration = Duration::from_millis(500);

/// Where the kernel shows PCI devices.
const PCI_DEVICES: &str = "/sys/bus/pci/devices";

/// Whether this is a virtual machine whose host offers mapping, or with the module loaded.
pub(super) fn is_introspector() -> bool {
    features().is_some() || (is_virtual() && is_loaded())
}

pub(super) fn checks() -> Vec<Check> {
    let features = features();
    let mut checks = vec![check_host(features, has_pci())];
    if features.is_none() && is_virtual() && has_pci() && !is_loaded() {
        checks.extend(without_module::checks(rustix::process::geteuid().is_root()));
    } else {
        checks.extend([check_module(), check_device(), views::check(features)]);
    }
    checks.push(check_vsock());
    // Pages are locked for mappings by hypercall alone, and views by PCI device alone come from the
    // guest endpoint.
    checks.push(match features {
        Some(_) => limits::memlock_in_guest(),
        None => check_guest_endpoint(ask_guest_endpoint(REFUSAL_LIMIT)),
    });
    checks
}

fn is_loaded() -> bool {
    Path::new("/sys/module/kvmmem").exists()
}

fn has_pci() -> bool {
    fs::read_dir(PCI_DEVICES).is_ok_and(|mut devices| devices.next().is_some())
}

/// The feature bits of the host, where its signature is seen.
fn features() -> Option<u32> {
    if !is_virtual() {
        return None;
    }
    let leaf = __cpuid(LEAF_SIGNATURE);
    let is_ours =
        [leaf.ebx, leaf.ecx, leaf.edx] == SIGNATURE_REGISTERS && leaf.eax >= LEAF_FEATURES;
    is_ours.then(|| __cpuid(LEAF_FEATURES).eax)
}

fn check_host(features: Option<u32>, has_pci: bool) -> Check {
    const NAME: &str = "host";
    const REMEDY: &str = "run it as an introspector: kvmmem vm --introspector on its host, or under QEMU what kvmmem \
         qemu-args prints there";
    let Some(features) = features else {
        return match (is_virtual(), has_pci) {
            (true, true) => {
                Check::ok(NAME, "no hypercalls, as under a stock QEMU: views come as PCI devices")
            }
            (true, false) => Check::fail(
                NAME,
                "no kvmmem signature in CPUID, and no PCI bus for devices",
                REMEDY,
            ),
            (false, _) => Check::fail(NAME, "this is not a virtual machine", REMEDY),
        };
    };
    let ways = [(FEATURE_VMCALL, "vmcall"), (FEATURE_DOORBELL, "doorbell port")];
    let ways: Vec<&str> =
        ways.into_iter().filter(|(bit, _)| features & bit != 0).map(|(_, name)| name).collect();
    if ways.is_empty() {
        return Check::fail(
            NAME,
            format!("the host offers no known way for hypercalls (features {features:#x})"),
            "use a host and a guest of the same release of kvmmem",
        );
    }
    Check::ok(NAME, format!("offers mapping, by {}", ways.join(" and ")))
}

fn check_module() -> Check {
    const NAME: &str = "module";
    if is_loaded() {
        return Check::ok(NAME, "kvmmem is loaded");
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let release = release.trim();
    if is_older(release) {
        return Check::fail(
            NAME,
            format!("kvmmem is not loaded, and kernel {release} is too old for it"),
            "boot a kernel from 7.3 on, with CONFIG_RUST",
        );
    }
    Check::fail(
        NAME,
        "kvmmem is not loaded",
        "modprobe kvmmem; if there is none, build it from kernel/ (docs/guide/introspector.md)",
    )
}

fn check_device() -> Check {
    const NAME: &str = "device";
    let path = device::default_path();
    match Device::open(&path) {
        Ok(_) => Check::ok(NAME, format!("{} can be opened", path.display())),
        Err(error) => {
            let cause = std::error::Error::source(&error).and_then(std::error::Error::source);
            let cause = cause.map_or_else(String::new, |cause| format!(": {cause}"));
            let remedy = match (&error, error.errno()) {
                // EACCES, EPERM
                (_, Some(13 | 1)) => {
                    "become a member of its group: usermod -aG kvmmem USER, then log in again"
                }
                (DeviceError::Open { .. }, None) => {
                    "it is something else: remove it, and load the module again"
                }
                _ => "load the module; if it is, is udev running?",
            };
            Check::fail(NAME, format!("{} cannot be opened{cause}", path.display()), remedy)
        }
    }
}

fn check_vsock() -> Check {
    const NAME: &str = "vsock";
    const REMEDY: &str = "give this virtual machine a context id (kvmmem vm --cid, QEMU's vhost-vsock-pci, libvirt's <vsock>) and load \
         vmw_vsock_virtio_transport";
    match vsock::get_local_cid() {
        Ok(cid) if cid > vsock::VMADDR_CID_HOST && cid < vsock::VMADDR_CID_ANY => {
            Check::ok(NAME, format!("context id {cid}"))
        }
        Ok(cid) => Check::fail(NAME, format!("context id {cid:#x} is not a guest's"), REMEDY),
        Err(error) => Check::fail(NAME, format!("/dev/vsock cannot be used: {error}"), REMEDY),
    }
}

/// Whether the host opens views for this virtual machine.
fn check_guest_endpoint(answer: Result<(), GuestEndpointError>) -> Check {
    const NAME: &str = "guest-endpoint";
    match answer {
        Ok(()) => Check::ok(NAME, "the host's broker opens views for this virtual machine"),
        Err(error) => {
            let remedy = match &error {
                GuestEndpointError::Connect { .. } => {
                    "on the host: is kvmmemd running, and was this virtual machine added (kvmmem introspector add)?"
                }
                GuestEndpointError::Refused { .. } => "do on the host what it says, then ask again",
                GuestEndpointError::Port(_) => {
                    "set it to the port of kvmmemd --guest-port, or unset it"
                }
                _ => "see the host's log: journalctl -u kvmmemd",
            };
            let source = std::error::Error::source(&error);
            let cause = source.map_or_else(String::new, |source| format!(": {source}"));
            let detail = match &error {
                GuestEndpointError::Connect { port, .. } => {
                    format!("nothing answers at the host's vsock port {port}")
                }
                error => error.to_string(),
            };
            Check::fail(NAME, format!("{detail}{cause}"), remedy)
        }
    }
}

/// Whether a kernel release is older than the module's first, 7.3.
fn is_older(release: &str) -> bool {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse::<u32>);
    let mut next = || numbers.next().and_then(Result::ok);
    matches!((next(), next()), (Some(major), Some(minor)) if (major, minor) < (7, 3))
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn a_closed_guest_endpoint_has_a_remedy() {
        assert_eq!(check_guest_endpoint(Ok(())).status, Status::Ok);
        let refused = std::io::Error::from_raw_os_error(104);
        let check =
            check_guest_endpoint(Err(GuestEndpointError::Connect { port: 27510, source: refused }));
        assert!(check.detail.contains("27510"), "{check:?}");
        assert!(check.remedy.unwrap().contains("introspector add"));
        let check = check_guest_endpoint(Err(GuestEndpointError::Answer { port: 1, source: None }));
        assert!(check.remedy.unwrap().contains("kvmmemd"));
    }

    #[test]
    fn what_the_host_offers_is_told() {
        assert!(check_host(Some(FEATURE_VMCALL), false).detail.contains("vmcall"));
        assert_eq!(check_host(Some(0), true).status, Status::Fail);
        let stock = check_host(None, true);
        assert_eq!(stock.status == Status::Ok, is_virtual(), "{stock:?}");
        assert!(check_host(None, false).remedy.unwrap().contains("qemu-args"));
    }

    #[test]
    fn kernels_before_the_first_are_told() {
        for release in ["6.12.41+deb13-amd64", "7.2.9", "5.4.24"] {
            assert!(is_older(release), "{release}");
        }
        for release in ["7.3.4+deb13-cloud-amd64", "7.10", "8.0.0-rc1", "", "unknown"] {
            assert!(!is_older(release), "{release}");
        }
    }
}
