// SPDX-License-Identifier: GPL-2.0-only
//! ABI: the numbers and structures shared with tools and hosts, from the crate `kvmmem-abi`.

#[path = "../crates/kvmmem-abi/src/cpuid.rs"]
pub(crate) mod cpuid;
#[path = "../crates/kvmmem-abi/src/descriptor.rs"]
pub(crate) mod descriptor;
#[path = "../crates/kvmmem-abi/src/errno.rs"]
pub(crate) mod errno;
#[path = "../crates/kvmmem-abi/src/hypercall.rs"]
pub(crate) mod hypercall;
#[path = "../crates/kvmmem-abi/src/ioctl.rs"]
pub(crate) mod ioctl;
#[path = "../crates/kvmmem-abi/src/native.rs"]
pub(crate) mod native;
#[path = "../crates/kvmmem-abi/src/region.rs"]
pub(crate) mod region;
#[path = "../crates/kvmmem-abi/src/token_list.rs"]
pub(crate) mod token_list;
