// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMs under stock QEMUs, as targets and as introspectors. Each has a guest that can be both, so that few are booted.

mod targets;

use crate::qemu::{Ram, Release, Spec};
use crate::scenarios::Scenario;

/// The scenarios of this folder, in the order in which they run.
pub(crate) const ALL: &[Scenario] = &[
    Scenario {
        name: "qemu_target_old",
        purpose: "Debian 12's QEMU, i440fx, 512 MiB: found, added by QMP, looked at",
        run: |world, report| targets::look(world, report, &OLD_PC, targets::By::Qmp),
    },
    Scenario {
        name: "qemu_target_new",
        purpose: "Debian backports' QEMU, q35, 5 GiB: found, added by its pid, looked at",
        run: |world, report| targets::look(world, report, &NEW_Q35, targets::By::Pid),
    },
    Scenario {
        name: "qemu_target_large",
        purpose: "RAM in large pages; the target is killed under a view",
        run: targets::large_pages_and_death,
    },
];

/// Debian 12's QEMU.
const OLD_PC: Spec = Spec {
    name: "old-pc",
    release: Release::Bookworm,
    machine: "pc",
    mib: 512,
    ram: Ram::Memfd,
    cid: 11,
    more: &[],
};

/// The newest QEMU, with RAM on both sides of the hole below 4 GiB.
const NEW_Q35: Spec = Spec {
    name: "new-q35",
    release: Release::Trixie,
    machine: "q35",
    mib: 5 << 10,
    ram: Ram::Memfd,
    cid: 12,
    more: &[],
};

/// RAM that needs its 512 MiB at once: ended as soon as it has been looked at.
const OLD_LARGE: Spec = Spec {
    name: "old-large",
    release: Release::Bookworm,
    machine: "q35",
    mib: 512,
    ram: Ram::LargePages,
    cid: 13,
    more: &[],
};
