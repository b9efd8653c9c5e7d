// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Hypervisor CPUID leaves with which a VMM offers kvmmem's hypercalls to its guest.

/// Leaf with the signature in ebx, ecx, edx and the highest leaf in eax.
pub const LEAF_SIGNATURE: u32 = 0x4000_0100;

/// Leaf with the feature bits in eax, the doorbell port in ebx and the descriptors' GSI in ecx.
pub const LEAF_FEATURES: u32 = 0x4000_0101;

/// The signature, as the bytes of ebx, ecx and edx.
pub const SIGNATURE: [u8; 12] = *b"KVMMEMKVMMEM";

/// [`SIGNATURE`] as the registers ebx, ecx, edx hold it.
pub const SIGNATURE_REGISTERS: [u32; 3] = [0x4d4d_564b, 0x564b_4d45, 0x4d45_4d4d];

/// Feature bit: `vmcall`/`vmmcall` reaches the VMM.
pub const FEATURE_VMCALL: u32 = 1 << 0;

/// Feature bit: the doorbell port reaches the VMM.
pub const FEATURE_DOORBELL: u32 = 1 << 1;

/// Feature bit: views are opened by the hypercall ATTACH ([`crate::hypercall`]), through a window
/// of guest-physical memory.
pub const FEATURE_WINDOW: u32 = 1 << 2;

/// Feature bit: the VMM raises the GSI in ecx of [`LEAF_FEATURES`], edge-triggered, after it has
/// changed a view's descriptor page by itself.
pub const FEATURE_INTERRUPT: u32 = 1 << 3;

/// The GSI of changed descriptors that `kvmmem-vmm` offers; guests take it from [`LEAF_FEATURES`].
pub const DESCRIPTOR_GSI: u32 = 5;

/// The doorbell port that `kvmmem-vmm` offers; guests take it from [`LEAF_FEATURES`].
pub const DOORBELL_PORT: u16 = 0x0d00;
