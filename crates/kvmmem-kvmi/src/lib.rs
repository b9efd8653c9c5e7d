//! kvmmem-kvmi
