// SPDX-License-Identifier: GPL-2.0-only
//! The ABI's structures as bytes, for copies to and from user memory.

use kernel::transmute::{AsBytes, FromBytes};

use crate::abi::hypercall::AttachRequest;
use crate::abi::ioctl::MemMap;
use crate::abi::native;

macro_rules! plain {
    ($($name:ty: $($field:ty),+;)*) => {
        $(
            const _: () = assert!(size_of::<$name>() == 0 $(+ size_of::<$field>())+);
            // SAFETY: `repr(C)` integers, whose sizes add up to the structure's: there is no
            // padding, so every byte is initialised.
            unsafe impl AsBytes for $name {}
            // SAFETY: integers, for which every bit pattern is valid. No interior mutability.
            unsafe impl FromBytes for $name {}
        )*
    };
}

// Each structure with its fields' types.
plain! {
    native::Info: u32, u32, u32, u32, [u32; 4];
    native::Ranges: u64, u32, u32, [u8; 16], u32, u32, u64;
    native::Range: u64, u64;
    native::Stats: [u64; 8];
    MemMap: [u64; 4], u64, u64;
    AttachRequest: [u64; 4], u32, u32, [u8; 16], u32, u32;
}
