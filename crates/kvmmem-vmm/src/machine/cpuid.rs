// SPDX-License-Identifier: Apache-2.0 OR MIT
//! CPUID of the guest: KVM's supported leaves, with this machine's topology, and kvmmem's leaves
//! for an introspector. KVM's own hypercalls are hidden if Xen's forwarding intercepts them.

use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use kvmmem_abi::cpuid::{
    DESCRIPTOR_GSI, DOORBELL_PORT, FEATURE_DOORBELL, FEATURE_INTERRUPT, FEATURE_VMCALL,
    FEATURE_WINDOW, LEAF_FEATURES, LEAF_SIGNATURE, SIGNATURE_REGISTERS,
};

use crate::status::ActiveMethod;

/// Leaf of KVM's feature bits (Documentation/virt/kvm/x86/cpuid.rst).
const KVM_FEATURES: u32 = 0x4000_0001;

/// Features whose use takes hypercalls, by bit: PV unhalt 7, PV send IPI 11, PV sched yield 13, map
/// GPA range 16, migration control 17. (Clock pairing has no bit; its hypercall gets
/// `-KVM_ENOSYS`.)
const HYPERCALL_FEATURES: u32 = 1 << 7 | 1 << 11 | 1 << 13 | 1 << 16 | 1 << 17;

/// Why the CPUID table could not be made.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// KVM did not say what it supports.
    #[error("cannot ask KVM for the CPUID leaves it supports")]
    Supported(#[source] kvm_ioctls::Error),
    /// Too many leaves.
    #[error("{entries} CPUID leaves are more than KVM takes")]
    TooMany {
        /// How many.
        entries: usize,
    },
}

/// What all vCPUs of a machine share.
#[derive(Clone, Debug)]
pub(crate) struct CpuidTemplate(Vec<kvm_cpuid_entry2>);

impl CpuidTemplate {
    /// The table for machines with `vcpus` CPUs, whose hypercalls take `method` if they are
    /// introspectors, which may have windows.
    pub(crate) fn new(
        kvm: &Kvm,
        vcpus: u8,
        method: Option<ActiveMethod>,
        has_windows: bool,
    ) -> Result<Self, CpuidError> {
        let supported =
            kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(CpuidError::Supported)?;
        let mut entries = supported.as_slice().to_vec();
        let has_deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
        adapt(&mut entries, vcpus, method, has_deadline_timer);
        if let Some(method) = method {
            entries.extend(kvmmem_leaves(method, has_windows));
        }
        Ok(Self(entries))
    }

    /// Number of bits of guest-physical addresses that a guest can use and the host can map.
    pub(crate) fn address_bits(&self) -> u32 {
        const ADDRESS_SIZES: u32 = 0x8000_0008;
        /// What a CPU has without that leaf.
        const LEAST: u32 = 36;
        let sizes = self
            .0
            .iter()
            .find(|entry| entry.function == ADDRESS_SIZES)
            .map_or(LEAST, |entry| entry.eax);
        match (sizes & 0xff, sizes >> 16 & 0xff) {
            (bits, 0) => bits,
            // The second one is what second-level page tables reach.
            (bits, guest_bits) => bits.min(guest_bits),
        }
    }

    /// The table for the CPU with APIC id `apic_id`.
    pub(crate) fn for_cpu(&self, apic_id: u8) -> Result<CpuId, CpuidError> {
        let mut entries = self.0.clone();
        let id = u32::from(apic_id);
        for entry in &mut entries {
            match entry.function {
                0x1 => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
                0xb | 0x1f => entry.edx = id,
                // Extended APIC id; one thread per core, so the core's id is the same; node 0 of 1.
                0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id, id, 0),
                _ => {}
            }
        }
        CpuId::from_entries(&entries).map_err(|_| CpuidError::TooMany { entries: entries.len() })
    }
}

/// Number of bits that tell `count` ids apart.
fn id_bits(count: u8) -> u32 {
    u8::BITS - count.saturating_sub(1).leading_zeros()
}

/// One package of `vcpus` cores with one thread each.
fn adapt(
    entries: &mut Vec<kvm_cpuid_entry2>,
    vcpus: u8,
    method: Option<ActiveMethod>,
    has_deadline_timer: bool,
) {
    const TSC_DEADLINE: u32 = 1 << 24;
    const HYPERVISOR: u32 = 1 << 31;
    const HTT: u32 = 1 << 28;
    const AMD_CMP_LEGACY: u32 = 1 << 1;
    const VMX: u32 = 1 << 5;
    const SVM: u32 = 1 << 2;
    let count = u32::from(vcpus);
    let bits = id_bits(vcpus);

    // The topology leaves are made anew: the host's say how the host's CPUs are laid out.
    entries.retain(|entry| !matches!(entry.function, 0xb | 0x1f | 0x4000_0100..=0x4000_01ff));
    for entry in entries.iter_mut() {
        match entry.function {
            0x1 => {
                entry.ebx = entry.ebx & 0xff00_ffff | count << 16;
                entry.ecx |= HYPERVISOR;
                entry.ecx = if has_deadline_timer {
                    entry.ecx | TSC_DEADLINE
                } else {
                    entry.ecx & !TSC_DEADLINE
                };
                entry.edx = if count > 1 { entry.edx | HTT } else { entry.edx & !HTT };
                // KVM keeps hold of pages that a nested guest's control structures name, while it
                // runs: so they could be reached after they were taken from an
                // introspector.
                if method.is_some() {
                    entry.ecx &= !VMX;
                }
            }
            // Caches: cores of the package, and the last level shared by all of them, the others by
            // none.
            0x4 if entry.eax & 0x1f != 0 => {
                let sharing = if entry.eax >> 5 & 7 >= 3 { count - 1 } else { 0 };
                entry.eax = entry.eax & 0x3fff | sharing << 14 | ((1 << bits) - 1) << 26;
            }
            KVM_FEATURES if method == Some(ActiveMethod::Xen) => entry.eax &= !HYPERCALL_FEATURES,
            0x8000_0001 => {
                entry.ecx = if count > 1 {
                    entry.ecx | AMD_CMP_LEGACY
                } else {
                    entry.ecx & !AMD_CMP_LEGACY
                };
                if method.is_some() {
                    entry.ecx &= !SVM;
                }
            }
            0x8000_0008 => entry.ecx = entry.ecx & !0xf0ff | bits << 12 | (count - 1),
            _ => {}
        }
    }
    let has_leaf_b = entries.iter().any(|entry| entry.function == 0 && entry.eax >= 0xb);
    if has_leaf_b {
        entries.extend(topology(0xb, count, bits));
    }
}

/// Leaf 0xb: a thread level of one thread, a core level of `count` cores, the end.
fn topology(function: u32, count: u32, bits: u32) -> [kvm_cpuid_entry2; 3] {
    const SIGNIFICANT_INDEX: u32 = 1;
    let level = |index, eax, ebx, kind: u32| kvm_cpuid_entry2 {
        function,
        index,
        flags: SIGNIFICANT_INDEX,
        eax,
        ebx,
        ecx: kind << 8 | index,
        ..Default::default()
    };
    [level(0, 0, 1, 1), level(1, bits, count, 2), level(2, 0, 0, 0)]
}

/// The leaves that the guest's module looks for.
fn kvmmem_leaves(method: ActiveMethod, has_windows: bool) -> [kvm_cpuid_entry2; 2] {
    let [ebx, ecx, edx] = SIGNATURE_REGISTERS;
    let (features, port) = match method {
        ActiveMethod::Xen => (FEATURE_VMCALL, 0),
        ActiveMethod::Port => (FEATURE_DOORBELL, u32::from(DOORBELL_PORT)),
    };
    let (window_features, gsi) =
        if has_windows { (FEATURE_WINDOW | FEATURE_INTERRUPT, DESCRIPTOR_GSI) } else { (0, 0) };
    [
        kvm_cpuid_entry2 {
            function: LEAF_SIGNATURE,
            eax: LEAF_FEATURES,
            ebx,
            ecx,
            edx,
            ..Default::default()
        },
        kvm_cpuid_entry2 {
            function: LEAF_FEATURES,
            eax: features | window_features,
            ebx: port,
            ecx: gsi,
            ..Default::default()
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Vec<kvm_cpuid_entry2> {
        [0x0, 0x1, 0xb, 0x1f, KVM_FEATURES, 0x4000_0100, 0x8000_0001, 0x8000_0008, 0x8000_001e]
            .map(|function| kvm_cpuid_entry2 {
                function,
                eax: u32::MAX,
                ebx: u32::MAX,
                ecx: u32::MAX,
                edx: u32::MAX,
                ..Default::default()
            })
            .to_vec()
    }

    fn leaf(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        let mut found =
            entries.iter().filter(|entry| entry.function == function && entry.index == index);
        let entry = *found.next().unwrap();
        assert!(found.next().is_none(), "{function:#x} twice");
        entry
    }

    #[test]
    fn an_introspector_sees_our_leaves_and_no_kvm_hypercalls() {
        let mut entries = host();
        adapt(&mut entries, 2, Some(ActiveMethod::Xen), true);
        entries.extend(kvmmem_leaves(ActiveMethod::Xen, false));
        let signature = leaf(&entries, LEAF_SIGNATURE, 0);
        let bytes: Vec<u8> = [signature.ebx, signature.ecx, signature.edx]
            .iter()
            .flat_map(|word| word.to_le_bytes())
            .collect();
        assert_eq!(bytes, kvmmem_abi::cpuid::SIGNATURE);
        assert_eq!(signature.eax, LEAF_FEATURES);
        let features = leaf(&entries, LEAF_FEATURES, 0);
        assert_eq!((features.eax, features.ebx), (FEATURE_VMCALL, 0));
        assert_eq!(leaf(&entries, KVM_FEATURES, 0).eax & HYPERCALL_FEATURES, 0);
        // Neither can it run guests of its own.
        assert_eq!(leaf(&entries, 1, 0).ecx & 1 << 5, 0);
        assert_eq!(leaf(&entries, 0x8000_0001, 0).ecx & 1 << 2, 0);
        // kvmclock stays.
        assert_ne!(leaf(&entries, KVM_FEATURES, 0).eax & (1 << 3), 0);

        let [_, features] = kvmmem_leaves(ActiveMethod::Port, true);
        assert_eq!(
            (features.eax, features.ebx, features.ecx),
            (
                FEATURE_DOORBELL | FEATURE_WINDOW | FEATURE_INTERRUPT,
                u32::from(DOORBELL_PORT),
                DESCRIPTOR_GSI
            )
        );
    }

    #[test]
    fn other_machines_see_what_kvm_offers() {
        let mut entries = host();
        adapt(&mut entries, 1, None, false);
        assert!(entries.iter().all(|entry| entry.function != LEAF_SIGNATURE));
        assert_eq!(leaf(&entries, KVM_FEATURES, 0).eax, u32::MAX);
        assert_ne!(leaf(&entries, 1, 0).ecx & 1 << 5, 0);
        assert_eq!(leaf(&entries, 1, 0).ecx & (1 << 24), 0);
    }

    #[test]
    fn apic_ids_are_the_cpus_own() {
        let mut entries = host();
        adapt(&mut entries, 5, None, true);
        let cpu = CpuidTemplate(entries).for_cpu(4).unwrap();
        let entries = cpu.as_slice();
        assert_eq!(leaf(entries, 1, 0).ebx >> 16, 4 << 8 | 5);
        assert_eq!(leaf(entries, 0xb, 1).edx, 4);
        assert_eq!((leaf(entries, 0xb, 1).eax, leaf(entries, 0xb, 1).ebx), (3, 5));
        assert_eq!(leaf(entries, 0x8000_001e, 0).eax, 4);
        assert_eq!(leaf(entries, 0x8000_0008, 0).ecx & 0xf0ff, 3 << 12 | 4);
    }

    #[test]
    fn addresses_end_where_both_sides_can() {
        let with = |eax| {
            CpuidTemplate(vec![kvm_cpuid_entry2 {
                function: 0x8000_0008,
                eax,
                ..Default::default()
            }])
        };
        assert_eq!(with(0x3030).address_bits(), 48);
        assert_eq!(with(0x30_3934).address_bits(), 48);
        assert_eq!(with(0x34_3028).address_bits(), 40);
        assert_eq!(CpuidTemplate(Vec::new()).address_bits(), 36);
    }

    #[test]
    fn ids_take_as_many_bits_as_they_need() {
        assert_eq!([1, 2, 3, 4, 5, 64].map(id_bits), [0, 1, 2, 2, 3, 6]);
    }
}
