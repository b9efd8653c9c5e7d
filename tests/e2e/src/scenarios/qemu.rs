// SPDX-License-Identifier: Apache-2.0 OR MIT
//! VMs under stock QEMUs, as targets and as introspectors. Each has a guest that can be both, so
//! that few are booted.

mod ends;
mod grants;
mod introspectors;
pub(super) mod looked_at;
mod silence;
mod targets;
mod v1;

use anyhow::Result;
use serde_json::json;

use crate::qemu::{Ram, Release, Spec};
use crate::scenarios::Scenario;
use crate::wait;
use crate::world::World;

/// The scenarios of this folder, in the order in which they run: those that end a VM that others
/// need come last.
pub(crate) const ALL: &[Scenario] = &[
    Scenario {
        name: "qemu_target_old",
        purpose: "Debian 12's QEMU, i440fx, 5 GiB: found, added by QMP, looked at",
        run: |world, report| targets::look(world, report, &OLD_PC, targets::By::Qmp),
    },
    Scenario {
        name: "qemu_target_new",
        purpose: "Debian backports' QEMU, q35, 5 GiB: found, added by its pid, looked at",
        run: |world, report| targets::look(world, report, &NEW_Q35, targets::By::Pid),
    },
    Scenario {
        name: "qemu_private",
        purpose: "RAM that QEMU keeps to itself is read by copies, and never shown to guests",
        run: targets::private,
    },
    Scenario {
        name: "qemu_introspector_new",
        purpose: "an introspector under the new QEMU, q35, looks at kvmmem vm's target",
        run: |world, report| introspectors::look(world, report, &NEW_Q35),
    },
    Scenario {
        name: "qemu_introspector_old",
        purpose: "the same under Debian 12's QEMU, i440fx",
        run: |world, report| introspectors::look(world, report, &OLD_PC),
    },
    Scenario {
        name: "qemu_pair",
        purpose: "stock QEMUs on both sides, and 5 GiB in several windows",
        run: introspectors::pair,
    },
    Scenario {
        name: "qemu_parts",
        purpose: "a grant of some pages shows those alone, or nothing where QEMU cannot",
        run: grants::parts,
    },
    Scenario {
        name: "qemu_slots",
        purpose: "an introspector whose slots are all taken",
        run: grants::slots,
    },
    Scenario {
        name: "qemu_v1",
        purpose: "v1's and libkvmi's calls in an introspector under a stock QEMU",
        run: v1::v1,
    },
    Scenario {
        name: "qemu_revoke",
        purpose: "a grant is revoked under a process that reads, and a tool is killed",
        run: ends::revoke,
    },
    Scenario {
        name: "qemu_silence",
        purpose: "a guest that does not answer is reported, or its VM paused",
        run: silence::report_and_pause,
    },
    Scenario {
        name: "qemu_reset",
        purpose: "the introspector is reset under a view",
        run: ends::reset,
    },
    Scenario {
        name: "qemu_target_large",
        purpose: "RAM in large pages; the target is killed under views",
        run: targets::large_pages_and_death,
    },
    Scenario {
        name: "qemu_silence_kill",
        purpose: "a guest that does not answer is killed where the operator said so",
        run: silence::kill,
    },
];

/// Debian 12's QEMU, with RAM on both sides of the hole below 4 GiB.
const OLD_PC: Spec = Spec {
    name: "old-pc",
    release: Release::Bookworm,
    machine: "pc",
    mib: 5 << 10,
    ram: Ram::Memfd,
    cid: 11,
    largest: "512M",
    kernel: None,
};

/// The newest QEMU, and again more RAM than fits below the hole.
const NEW_Q35: Spec = Spec {
    name: "new-q35",
    release: Release::Trixie,
    machine: "q35",
    mib: 5 << 10,
    ram: Ram::TwoNodes,
    cid: 12,
    largest: "5G",
    kernel: None,
};

/// What a QEMU is whose user never heard of shared RAM.
const NEW_PC: Spec = Spec {
    name: "new-pc",
    release: Release::Trixie,
    machine: "pc",
    mib: 512,
    ram: Ram::Private,
    cid: 14,
    largest: "512M",
    kernel: None,
};

/// RAM that needs its 512 MiB at once: ended as soon as it has been looked at.
const OLD_LARGE: Spec = Spec {
    name: "old-large",
    release: Release::Bookworm,
    machine: "q35",
    mib: 512,
    ram: Ram::LargePages,
    cid: 13,
    largest: "512M",
    kernel: None,
};

/// Whether QEMU soon has no window any more.
pub(super) fn is_empty(world: &World, spec: &Spec) -> Result<bool> {
    // 0x1110 is ivshmem's PCI device id.
    let is_window = "\"device\":4368,";
    wait::until(|| {
        Ok(!world.qemu(spec)?.qmp("query-pci", &json!({}))?.to_string().contains(is_window))
    })
}

/// A number as the tools write it.
fn number(text: &str) -> Result<u64> {
    let digits = text.strip_prefix("0x");
    Ok(digits.map_or_else(|| text.parse(), |digits| u64::from_str_radix(digits, 16))?)
}
