// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The programs that run VMs, by their names and options.

use std::collections::BTreeSet;

use serde::Serialize;

/// A program that runs VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Vmm {
    /// QEMU.
    Qemu,
    /// Cloud Hypervisor.
    CloudHypervisor,
    /// crosvm.
    Crosvm,
    /// Firecracker.
    Firecracker,
    /// `kvmmem vm`.
    Kvmmem,
}

/// Options of QEMU. Its tools (`qemu-img`, `qemu-nbd`, `qemu-storage-daemon`) and its user
/// emulators have one of them at most.
const QEMUS_OPTIONS: [&str; 17] = [
    "M",
    "accel",
    "boot",
    "cpu",
    "device",
    "display",
    "drive",
    "enable-kvm",
    "kernel",
    "machine",
    "name",
    "netdev",
    "nodefaults",
    "nographic",
    "qmp",
    "smp",
    "uuid",
];

/// Whether a command line is one that starts a VM under QEMU, by two options or more that QEMU has.
pub(crate) fn has_qemus_options(arguments: &[String]) -> bool {
    let option = |word: &String| {
        let key = word.strip_prefix("--").or_else(|| word.strip_prefix('-'))?;
        QEMUS_OPTIONS.iter().find(|option| **option == key).copied()
    };
    let found: BTreeSet<&str> = arguments.iter().skip(1).filter_map(option).collect();
    found.len() >= 2
}

impl Vmm {
    /// Which VMM a process is, by its program's file name and its arguments. A QEMU under another
    /// name, as a wrapper's or a patched one, is told by the name in its arguments or by its
    /// options.
    pub fn recognise(program: &str, arguments: &[String]) -> Option<Self> {
        let called = arguments.first().and_then(|word| word.rsplit('/').next()).unwrap_or_default();
        match program {
            "qemu-kvm" | "qemu-system" | "kvm" => Some(Self::Qemu),
            _ if program.contains("qemu-system-") || called.starts_with("qemu-system-") => {
                Some(Self::Qemu)
            }
            _ if program.contains("qemu") && has_qemus_options(arguments) => Some(Self::Qemu),
            _ if program.starts_with("cloud-hypervisor") => Some(Self::CloudHypervisor),
            _ if program.starts_with("firecracker") => Some(Self::Firecracker),
            "crosvm" if arguments.iter().any(|word| word == "run") => Some(Self::Crosvm),
            "kvmmem" if arguments.iter().any(|word| word == "vm") => Some(Self::Kvmmem),
            _ => None,
        }
    }

    /// How people call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qemu => "QEMU",
            Self::CloudHypervisor => "Cloud Hypervisor",
            Self::Crosvm => "crosvm",
            Self::Firecracker => "Firecracker",
            Self::Kvmmem => "kvmmem",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_recognised_by_name() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(Vmm::recognise("qemu-system-aarch64", &[]), Some(Vmm::Qemu));
        assert_eq!(Vmm::recognise("firecracker-v1.9.0", &[]), Some(Vmm::Firecracker));
        assert_eq!(Vmm::recognise("kvmmem", &words("kvmmem --json vm")), Some(Vmm::Kvmmem));
        assert_eq!(Vmm::recognise("kvmmem", &words("kvmmem target list")), None);
        assert_eq!(Vmm::recognise("qemu-img", &[]), None);
    }

    #[test]
    fn a_qemu_is_recognised_under_another_name() {
        let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let qemu = "-name guest=web,debug-threads=on -m 32 -machine q35";
        for (program, called) in [
            (".qemu-system-x86_64-wrapped", "x"),
            ("wrapper", "/nix/store/x/bin/qemu-system-x86_64"),
            ("qemu_patched", "./qemu_patched"),
            ("my-qemu", "my-qemu"),
        ] {
            let arguments = words(&format!("{called} {qemu}"));
            assert_eq!(Vmm::recognise(program, &arguments), Some(Vmm::Qemu), "{program}");
        }
        for (program, line) in [
            ("qemu-img", "qemu-img convert -m 8 -S 4k -O qcow2 -p a b"),
            ("qemu-nbd", "qemu-nbd --connect=/dev/nbd0 --object secret,id=s --persistent x.qcow2"),
            (
                "qemu-storage-daemon",
                "qemu-storage-daemon --blockdev file --export x --chardev y --monitor z",
            ),
            ("qemu-x86_64", "qemu-x86_64 -cpu max -L /usr/arm ./program x"),
            ("vmm", &format!("vmm {qemu}")),
            ("bash", "bash -c qemu-system-x86_64"),
        ] {
            assert_eq!(Vmm::recognise(program, &words(line)), None, "{program}");
        }
    }
}
