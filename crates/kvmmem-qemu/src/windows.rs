// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Windows: memory of other VMs as PCI BARs of a QEMU, plugged in and out while its VM runs.
//!
//! A view is `ivshmem-plain` devices over the files of the target's RAM, cut into BARs
//! ([`layout`]), in slots that QEMU has free ([`pci_slots`]), and a descriptor page for each slot
//! that tells the guest's driver what is where ([`descriptor`]) and which tokens it may serve
//! ([`token_list`]). [`plug`] is what QEMU has been told of one view; [`machine`] what is asked of
//! a QEMU before it gets one. Who sees what, and for how long, is the broker's to say.

pub mod descriptor;
pub mod layout;
pub mod machine;
pub mod pci_slots;
pub mod plug;
pub mod token_list;
