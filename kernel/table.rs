// SPDX-License-Identifier: GPL-2.0-only
//! Mapping table: the sources of the crate `kvmmem-table`, which has its tests.

#[path = "../crates/kvmmem-table/src/map.rs"]
pub(crate) mod map;
#[path = "../crates/kvmmem-table/src/ops.rs"]
pub(crate) mod ops;
#[path = "../crates/kvmmem-table/src/record.rs"]
pub(crate) mod record;
#[path = "../crates/kvmmem-table/src/table.rs"]
#[allow(clippy::module_inception)]
pub(crate) mod table;
