//! kvmmem
