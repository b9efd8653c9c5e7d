//! kvmmem-broker
