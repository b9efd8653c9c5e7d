//! kvmmem-table
