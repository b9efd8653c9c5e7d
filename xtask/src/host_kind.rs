// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Where the test VMs run: right on this machine, or inside an emulated host.

use std::fs::{self, OpenOptions};

/// How the test bed gets a KVM host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum HostKind {
    /// This machine is the host.
    Direct,
    /// A stock Debian host under QEMU's software emulation.
    Nested,
}

/// `nested` or `direct` chooses, against what this machine has.
const VARIABLE: &str = "KVMMEM_TEST_BED_HOST";

impl HostKind {
    /// The kind for this machine, and why.
    pub(crate) fn choose() -> (Self, String) {
        match std::env::var(VARIABLE).as_deref() {
            Ok("nested") => return (Self::Nested, format!("{VARIABLE} says so")),
            Ok("direct") => return (Self::Direct, format!("{VARIABLE} says so")),
            _ => {}
        }
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        // Some machines have a /dev/kvm without hardware behind it, which takes minutes to boot a
        // kernel.
        if !has_virtualisation(&info) {
            return (
                Self::Nested,
                "this machine has no hardware virtualisation (svm, vmx)".to_owned(),
            );
        }
        for device in ["/dev/kvm", "/dev/vhost-vsock"] {
            if let Err(error) = OpenOptions::new().read(true).write(true).open(device) {
                return (Self::Nested, format!("{device} cannot be used: {error}"));
            }
        }
        (
            Self::Direct,
            "this machine has hardware virtualisation, /dev/kvm and /dev/vhost-vsock".to_owned(),
        )
    }

    /// As in the environment of the host's program.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Nested => "nested",
        }
    }
}

fn has_virtualisation(info: &str) -> bool {
    info.lines()
        .filter(|line| line.starts_with("flags"))
        .any(|line| line.split_ascii_whitespace().any(|flag| flag == "svm" || flag == "vmx"))
}

#[cfg(test)]
mod tests {
    use super::has_virtualisation;

    #[test]
    fn only_whole_flags_count() {
        assert!(has_virtualisation("model name: x\nflags\t\t: fpu svm sse\n"));
        assert!(has_virtualisation("flags : vmx\n"));
        assert!(!has_virtualisation("flags : fpu svm_lock\nvmx flags : vnmi vmx\n"));
    }
}
