// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The host's side: can it run targets and introspectors?

use std::fs::{self, OpenOptions};
use std::io::ErrorKind;
use std::path::Path;

use kvm_ioctls::Kvm;
use kvmmem::view::default_socket;
use kvmmem_client::ClientError;
use kvmmem_client::admin::{Admin, FreeSlots, TargetInfo};
use kvmmem_proto::message::Refusal;
use kvmmem_proto::packet::PacketError;
use kvmmem_sys::xen;
use rustix::io::Errno;

use super::check::Check;
use super::{guest, limits};
use crate::number::count;

/// The KVM API's only version (`KVM_GET_API_VERSION`).
const KVM_API_VERSION: i32 = 12;

const HARDWARE_REMEDY: &str = "enable virtualisation (VT-x, AMD-V) in the firmware, or nested virtualisation in the \
     host of this virtual machine, then: modprobe kvm_intel or kvm_amd";

pub(super) fn checks() -> Vec<Check> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let is_pvm = Path::new("/sys/module/kvm_pvm").exists();
    let kvm = Kvm::new();
    let mut checks = vec![check_kvm(kvm.as_ref()), check_hardware(&cpuinfo, is_pvm, kvm.is_ok())];
    if let Ok(kvm) = &kvm {
        checks.push(check_hypercalls(kvm));
    }
    checks.extend([check_vhost_vsock(), limits::memlock_on_host(), limits::max_map_count()]);
    checks.extend(check_broker(&default_socket()));
    checks
}

fn check_kvm(kvm: Result<&Kvm, &kvm_ioctls::Error>) -> Check {
    const NAME: &str = "kvm";
    let kvm = match kvm {
        Ok(kvm) => kvm,
        Err(error) => {
            let remedy = match std::io::Error::from_raw_os_error(error.errno()).kind() {
                ErrorKind::NotFound => HARDWARE_REMEDY,
                ErrorKind::PermissionDenied => {
                    "become a member of the group that owns it: usermod -aG kvm USER"
                }
                _ => HARDWARE_REMEDY,
            };
            return Check::fail(NAME, format!("/dev/kvm cannot be opened: {error}"), remedy);
        }
    };
    match (kvm.get_api_version(), kvm.create_vm()) {
        (KVM_API_VERSION, Ok(_)) => Check::ok(NAME, "/dev/kvm makes virtual machines"),
        (KVM_API_VERSION, Err(error)) => Check::fail(
            NAME,
            format!("/dev/kvm makes no virtual machine: {error}"),
            "does another hypervisor use the processor? End it",
        ),
        (version, _) => Check::fail(
            NAME,
            format!("/dev/kvm has API version {version}, not {KVM_API_VERSION}"),
            "use a Linux kernel from 2.6.22 on",
        ),
    }
}

fn check_hardware(cpuinfo: &str, is_pvm: bool, has_kvm: bool) -> Check {
    const NAME: &str = "hardware";
    let has_flag = |flag: &str| {
        cpuinfo
            .lines()
            .filter_map(|line| line.strip_prefix("flags"))
            .any(|flags| flags.split_ascii_whitespace().any(|word| word == flag))
    };
    if has_flag("svm") {
        return Check::ok(NAME, "AMD SVM");
    }
    if has_flag("vmx") {
        return Check::ok(NAME, "Intel VMX");
    }
    if is_pvm {
        return Check::warn(
            NAME,
            "kvm_pvm: virtual machines run without the processor's help",
            "bare guests run; a distribution's kernel takes minutes to boot, so use the nested test bed for Linux guests",
        );
    }
    let detail = "the processor shows neither svm nor vmx";
    if has_kvm {
        Check::warn(NAME, detail, HARDWARE_REMEDY)
    } else {
        Check::fail(NAME, detail, HARDWARE_REMEDY)
    }
}

fn check_hypercalls(kvm: &Kvm) -> Check {
    let detail = if xen::can_intercept(kvm) {
        "vmcall is forwarded (KVM_CAP_XEN_HVM, INTERCEPT_HCALL)"
    } else {
        "by the doorbell port: this kernel's KVM has no CONFIG_KVM_XEN to forward vmcall with"
    };
    Check::ok("hypercalls", detail)
}

fn check_vhost_vsock() -> Check {
    const NAME: &str = "vhost_vsock";
    const PATH: &str = "/dev/vhost-vsock";
    let Err(error) = OpenOptions::new().read(true).write(true).open(PATH) else {
        return Check::ok(NAME, format!("{PATH} can be opened"));
    };
    let remedy = match error.kind() {
        ErrorKind::PermissionDenied => {
            "become a member of the group that owns it: usermod -aG kvm USER"
        }
        _ if guest::is_virtual() => {
            "modprobe vhost_vsock; in a virtual machine, unload vmw_vsock_vmci_transport first"
        }
        _ => "modprobe vhost_vsock",
    };
    Check::fail(
        NAME,
        format!("{PATH} cannot be opened: {error}; introspectors get their tokens by vsock"),
        remedy,
    )
}

/// Usable without: the broker is a program like any other, and can be started at any time.
fn check_broker(socket: &Path) -> Vec<Check> {
    const NAME: &str = "broker";
    let ask = || {
        let mut admin = Admin::connect(socket)?;
        let vms = admin.targets()?;
        Ok::<_, ClientError>((admin, vms))
    };
    match ask() {
        Ok((mut admin, vms)) => {
            let detail = format!(
                "kvmmemd at {} knows {}",
                socket.display(),
                count(vms.len(), "virtual machine")
            );
            let introspectors = vms.iter().filter(|vm| vm.identity.introspector);
            let slots = introspectors
                .filter_map(|vm| check_slots(vm, admin.free_slots(&vm.identity.uuid.to_string())));
            std::iter::once(Check::ok(NAME, detail)).chain(slots).collect()
        }
        Err(error) => {
            let remedy = broker_remedy(&error);
            vec![Check::warn(NAME, format!("{:#}", anyhow::Error::new(error)), remedy)]
        }
    }
}

fn broker_remedy(error: &ClientError) -> &'static str {
    match error {
        ClientError::Connect {
            source: PacketError::Connect(Errno::ACCESS | Errno::PERM), ..
        } => {
            "become a member of the group that owns the socket (usermod -aG GROUP USER, then log in again), or run kvmmem as \
             root"
        }
        _ => {
            "start kvmmemd; its socket is open to root and to the group that its --group names; root can look without it"
        }
    }
}

/// How many views an introspector under a stock QEMU can still open; `None` for other VMs.
fn check_slots(vm: &TargetInfo, slots: Result<FreeSlots, ClientError>) -> Option<Check> {
    const NAME: &str = "introspector";
    let cid = vm.identity.cid.map_or_else(|| "none".to_owned(), |cid| cid.to_string());
    let who = format!("{}, context id {cid}", vm.identity.name);
    Some(match slots {
        Ok(FreeSlots { retired, .. }) if !retired.is_empty() => Check::warn(
            NAME,
            format!(
                "{who}: {} not used: a tool without the module did not acknowledge the end of its view there",
                retired.join(", ")
            ),
            "reset it when that suits (QMP system_reset, a reboot of its guest)",
        ),
        Ok(FreeSlots { free: 0, count, .. }) => Check::warn(
            NAME,
            format!("{who}: all {count} slots for views are taken"),
            "close views, or start it with more slots: kvmmem qemu-args --views",
        ),
        Ok(FreeSlots { free, count, .. }) => {
            Check::ok(NAME, format!("{who}: {free} of {count} slots for views are free"))
        }
        Err(ClientError::Refused { refusal: Refusal::Denied, .. }) => return None,
        Err(error) => Check::warn(
            NAME,
            format!("{who}: {:#}", anyhow::Error::new(error)),
            "is its QMP socket the broker's alone? kvmmem qemu-args prints one",
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::super::Status;
    use super::*;

    #[test]
    fn hardware_is_told_apart() {
        let amd = "processor\t: 0\nflags\t\t: fpu svm npt\n";
        let intel = "flags\t\t: fpu vmx ept\n";
        let none = "flags\t\t: fpu svm_lock hypervisor\nbugs\t\t: svm\n";
        assert_eq!(check_hardware(amd, false, true).status, Status::Ok);
        assert_eq!(check_hardware(intel, false, true).status, Status::Ok);
        assert!(check_hardware(none, true, true).detail.contains("kvm_pvm"));
        assert_eq!(check_hardware(none, true, true).status, Status::Warn);
        assert_eq!(check_hardware(none, false, false).status, Status::Fail);
        assert_eq!(check_hardware("", false, false).status, Status::Fail);
    }

    fn slots(free: u32, retired: &[&str]) -> FreeSlots {
        FreeSlots { free, count: 2, retired: retired.iter().map(ToString::to_string).collect() }
    }

    #[test]
    fn introspectors_without_a_free_slot_are_told() {
        let vm = TargetInfo { memory_bytes: 0, ..crate::registered::example("lion") };
        let check = check_slots(&vm, Ok(slots(1, &[]))).unwrap();
        assert_eq!(
            (check.status, check.detail.as_str()),
            (Status::Ok, "lion, context id 3: 1 of 2 slots for views are free")
        );
        assert!(check_slots(&vm, Ok(slots(0, &[]))).unwrap().remedy.unwrap().contains("--views"));
        let retired = check_slots(&vm, Ok(slots(1, &["kvmmem0"]))).unwrap();
        assert!(retired.detail.contains("kvmmem0") && retired.remedy.unwrap().contains("reset"));
        let refused =
            |refusal| Err(ClientError::Refused { refusal, message: "no QEMU".to_owned() });
        assert!(check_slots(&vm, refused(Refusal::Denied)).is_none());
        let silent = check_slots(&vm, refused(Refusal::Busy)).unwrap();
        assert!(silent.status == Status::Warn && silent.detail.contains("no QEMU"), "{silent:?}");
    }

    #[test]
    fn a_socket_that_this_user_may_not_open_is_no_reason_to_start_a_broker() {
        let remedy = |errno| {
            let source = PacketError::Connect(errno);
            broker_remedy(&ClientError::Connect { path: "/run/x".into(), source })
        };
        assert!(remedy(Errno::ACCESS).contains("usermod -aG"));
        assert!(!remedy(Errno::ACCESS).contains("start kvmmemd"));
        assert!(remedy(Errno::NOENT).contains("start kvmmemd"));
    }

    #[test]
    fn a_missing_kvm_has_a_remedy() {
        for (errno, word) in [(2, "modprobe"), (13, "group"), (16, "virtualisation")] {
            let check = check_kvm(Err(&kvm_ioctls::Error::new(errno)));
            assert_eq!(check.status, Status::Fail);
            assert!(check.remedy.unwrap().contains(word), "{errno}");
        }
    }
}
