//! kvmmem-vmm
